"""Norm sites are data: every site takes every function, an empty site is nothing at all, overrides do what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models import PLANS, SITES, ConfigError, ModelConfig, Transformer
from models.config import AlphaConfig, InitConfig, ResidualConfig
from models.initialization import measure_alpha
from models.norms import NORMS
from models.plan import resolve_plan
from tests.models.building import build, tiny, tokens

# Where a site's module stands in the model, and over how many features (heads 4 of 8, 2 for keys, feed-forward 40).
PLACES = {
    "embed": ("embed", 32),
    "attn_in": ("blocks.0.attn_in", 32),
    "query": ("blocks.0.attention.query", 8),
    "key": ("blocks.0.attention.key", 8),
    "value": ("blocks.0.attention.value", 8),
    "attn_mid": ("blocks.0.attention.attn_mid", 32),
    "attn_out": ("blocks.0.attn_out", 32),
    "attn_post": ("blocks.0.attn_post", 32),
    "mlp_in": ("blocks.0.mlp_in", 32),
    "mlp_act": ("blocks.0.feedforward.mlp_act", 40),
    "mlp_mid": ("blocks.0.feedforward.mlp_mid", 40),
    "mlp_out": ("blocks.0.mlp_out", 32),
    "mlp_post": ("blocks.0.mlp_post", 32),
    "final": ("final", 32),
}


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module) in NORMS.values()}


def test_the_sites_are_all_here() -> None:
    assert set(PLACES) == set(SITES)


@pytest.mark.parametrize("function", NORMS)
@pytest.mark.parametrize("site", SITES)
def test_every_site_takes_every_function(site: str, function: str) -> None:
    model = build(tiny(plan="none", sites={site: function}, depth=1, kv_heads=2))
    place, features = PLACES[site]
    assert list(norms_of(model)) == [place]
    module = norms_of(model)[place]
    assert type(module) is NORMS[function]
    widths: list[int] = []
    module.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[-1]))
    model(tokens(), tokens(seed=1))[0].backward()
    assert widths == [features]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("trunk", ["llama", "gpt"])
def test_a_site_without_entry_is_nothing(trunk: str) -> None:
    model = build(tiny(plan="none", trunk=trunk))
    kinds = {type(module) for module in model.modules()}
    assert {kind.__name__ for kind in kinds} == {
        "Transformer", "Embedding", "ModuleList", "Block", "Attention", "FeedForward", "Linear"
    }  # fmt: skip
    assert all(name.endswith("weight") and parameter.ndim == 2 for name, parameter in model.named_parameters())
    assert not list(model.buffers())


@pytest.mark.parametrize("plan", PLANS)
def test_plans_have_their_sites_and_no_more(plan: str) -> None:
    model = build(tiny(plan=plan, depth=1))
    expected = {
        "llama": "attn_in mlp_in final",
        "gpt": "attn_in mlp_in final",
        "dyt": "attn_in mlp_in final",
        "derf": "attn_in mlp_in final",
        "hardtanh": "attn_in mlp_in final",
        "sigmoid": "attn_in mlp_in final",
        "softsign": "attn_in mlp_in final",
        "isru": "attn_in mlp_in final",
        "identity": "attn_in mlp_in final",
        "dnt": "embed attn_in query key attn_out mlp_out final",
        "dnt-s1": "attn_in mlp_in final",
        "dnt-s2": "attn_in query key mlp_in final",
        "dnt-s3": "embed attn_in query key mlp_in final",
        "dnt-s4": "embed attn_in query key attn_out mlp_in mlp_out final",
        "peri": "embed attn_in attn_out mlp_in mlp_out final",
        "sandwich": "attn_in attn_out mlp_in mlp_out final",
        "sub-ln": "attn_in attn_mid mlp_in mlp_mid final",
        "olmo2": "query key attn_out mlp_out final",
        "post": "attn_post mlp_post",
        "deepnorm": "attn_post mlp_post",
        "mix-ln": "attn_post mlp_post final",
        "hybridnorm": "query key value attn_post final",
        "hybridnorm-star": "attn_in query key value mlp_in final",
        "fixup": "attn_in mlp_in mlp_act mlp_mid final",
    }.get(plan, "")
    function = {"gpt": "layernorm", "fixup": "identity"}.get(plan, plan if plan in NORMS else "rmsnorm")
    norms = norms_of(model)
    assert set(norms) == {PLACES[site][0] for site in expected.split()}
    assert {type(norm) for norm in norms.values()} <= {NORMS[function]}
    scaled = {"deepnorm", "rezero", "skipinit", "nf", "sigma-reparam", "fixup", "t-fixup", *NORMS}
    assert (model.embedding_scale is not None) == (plan in scaled)
    assert model(tokens()).shape == (2, 16, 61)


def block_sites(config: ModelConfig) -> list[set[str]]:
    names = [name.split(".") for name in norms_of(build(config))]
    return [{name[-1] for name in names if name[:2] == ["blocks", str(i)]} for i in range(config.depth)]


PRE, POST = {"attn_in", "mlp_in"}, {"attn_post", "mlp_post"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"depth": 8}, [POST, POST, PRE, PRE, PRE, PRE, PRE, PRE]),
        ({"depth": 2}, [POST, PRE]),  # a quarter of two blocks, but at least one
        ({"depth": 4, "first_blocks": 0.75}, [POST, POST, POST, PRE]),
        ({"depth": 4, "first_blocks": 3}, [POST, POST, POST, PRE]),
        ({"depth": 2, "first_blocks": 0}, [PRE, PRE]),
        ({"depth": 2, "first_blocks": 5}, [POST, POST]),
        ({"depth": 2, "sites": {"mlp_out": "dyt"}}, [POST | {"mlp_out"}, PRE | {"mlp_out"}]),
        ({"depth": 2, "first_sites": {"mlp_post": "none", "mlp_out": "dyt"}}, [{"attn_post", "mlp_out"}, PRE]),
        ({"depth": 2, "sites": {"mlp_in": "none"}}, [POST, {"attn_in"}]),
    ],
)
def test_first_blocks_have_sites_of_their_own(changes: dict[str, Any], expected: list[set[str]]) -> None:
    assert block_sites(tiny(plan="mix-ln", **changes)) == expected


def test_any_plan_can_have_first_blocks() -> None:
    changed = tiny(plan="llama", depth=3, first_blocks=1, first_sites={"attn_in": "dyt"})
    assert [type(block.attn_in) for block in build(changed).blocks] == [
        NORMS["dyt"],
        NORMS["rmsnorm"],
        NORMS["rmsnorm"],
    ]


def test_what_a_plan_brings_can_be_changed() -> None:
    plan = resolve_plan(tiny(plan="nf"))
    assert (plan.residual, plan.weights, plan.init, plan.embedding_scale) == ("nf", "standardized", "torch", True)
    plan = resolve_plan(
        tiny(
            plan="nf",
            residual=ResidualConfig(scheme="plain"),
            weights="plain",
            init=InitConfig(rule="standard"),
            embedding_scale="none",
        )
    )
    assert plan == resolve_plan(tiny(plan="none"))


def test_a_fixed_alpha_is_no_parameter() -> None:
    """It starts by the same rules, and is neither trained nor saved."""
    sites: dict[str, Any] = {
        "attn_in": {"function": "dyt", "alpha": "fixed"},
        "mlp_in": {"function": "dyt", "alpha": 0.25},
        "final": {"function": "dyt", "alpha": "learned"},
    }
    model = build(tiny(plan="dyt", sites=sites, alpha=AlphaConfig(rule="role", attention=0.75, other=0.5)))
    assert [name for name, _ in model.named_parameters() if name.endswith("alpha")] == ["final.alpha"]
    assert not [name for name in model.state_dict() if name.endswith("in.alpha")]
    assert (model.blocks[1].attn_in.alpha, model.blocks[1].mlp_in.alpha) == (0.75, 0.25)
    assert model.final.alpha.item() == 0.5
    measured = measure_alpha(model, lambda: model(tokens()), 1.0)
    assert set(measured) == {"final"}
    assert (model.blocks[1].attn_in.alpha, model.blocks[1].mlp_in.alpha) == (0.75, 0.25)


def sites(config: ModelConfig) -> dict[str, Any]:
    return dict(resolve_plan(config).sites)


def test_overrides_add_replace_and_remove() -> None:
    before = sites(tiny(plan="dnt"))
    changed = sites(tiny(plan="dnt", sites={"mlp_in": "dyt", "final": "layernorm", "embed": "none", "query": None}))
    assert changed == {k: v for k, v in before.items() if k not in ("embed", "query")} | {
        "mlp_in": "dyt",
        "final": "layernorm",
    }
    assert sites(tiny(plan="dnt")) == before, "a named plan is changed for nobody else"
    assert sites(tiny(plan="none", sites={"embed": "none"})) == {}


def test_settings_reach_the_function() -> None:
    model = build(
        tiny(plan="none", sites={"final": {"function": "dyt", "beta": True}, "embed": {"function": "rmsnorm"}})
    )
    assert model.final.bias is not None
    assert model.embed.eps == 1e-5
    model = build(tiny(plan="llama", sites={"final": {"function": "rmsnorm", "eps": 1e-2}}, norm_eps=1e-6))
    assert (model.final.eps, model.blocks[0].attn_in.eps) == (1e-2, 1e-6)


def test_bias_reaches_linears_and_layernorms() -> None:
    model = build(tiny(plan="gpt", trunk="gpt", bias=True))
    assert {n for n, m in model.named_modules() if hasattr(m, "bias") and m.bias is None} == set()
    model = build(tiny(plan="gpt", trunk="gpt"))
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


def test_query_key_scope_and_embedding_scale_can_be_changed() -> None:
    assert build(tiny(plan="dnt", qk_scope="projection")).blocks[0].attention.query.weight.shape == (32,)
    assert build(tiny(plan="olmo2", qk_scope="head")).blocks[0].attention.query.weight.shape == (8,)
    assert build(tiny(plan="olmo2", kv_heads=2)).blocks[0].attention.key.weight.shape == (16,)
    assert build(tiny(plan="dyt", embedding_scale="none")).embedding_scale is None
    assert build(tiny(plan="llama", embedding_scale="learned")).embedding_scale.shape == (1,)


def test_embedding_scale_and_norm_stand_in_order() -> None:
    """Scale, then norm, then block: doubling the scale does nothing behind an RMSNorm."""
    config = tiny(plan="dnt", embedding_scale="learned", norm_eps=1e-12)
    model = build(config)
    before = model(tokens())
    with torch.no_grad():
        model.embedding_scale.mul_(2)
    torch.testing.assert_close(model(tokens()), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"plan": "dntt"}, ["model.plan", "'dntt'", "did you mean 'dnt'"]),
        ({"sites": {"atn_in": "rmsnorm"}}, ["model.sites", "'atn_in'", "did you mean 'attn_in'"]),
        ({"sites": {"final": 3}}, ["model.sites.final", "3", "rmsnorm"]),
        ({"sites": {"final": {"beta": True}}}, ["model.sites.final", "function"]),
        ({"sites": {"final": {}}}, ["model.sites.final", "function"]),
        ({"first_blocks": 1, "first_sites": {"final": "dyt"}}, ["model.first_sites", "'final'"]),
        ({"first_blocks": 1, "first_sites": {"mlp_out": 3}}, ["model.first_sites.mlp_out", "3", "rmsnorm"]),
        ({"first_sites": {"mlp_out": "dyt"}}, ["model.first_sites", "model.first_blocks"]),
        ({"first_blocks": -1}, ["model.first_blocks is -1"]),
        ({"first_blocks": 1.5}, ["model.first_blocks is 1.5", "share"]),
        (
            {"sites": {"final": {"function": "dyt", "alpha": "fixed"}}, "alpha": AlphaConfig(rule="measured")},
            ["model.sites.final", "fixed", "measured"],
        ),
        ({"residual": ResidualConfig(initial=0.1)}, ["model.residual.initial is 0.1", "plain", "skipinit"]),
        (
            {"residual": ResidualConfig(scheme="rezero", constant=0.1)},
            ["model.residual.constant is 0.1", "rezero", "deepnorm"],
        ),
        ({"residual": ResidualConfig(scheme="nf", constant=-1.0)}, ["model.residual.constant is -1.0", "positive"]),
        ({"width": 30}, ["model.width 30", "model.heads 4"]),
        ({"width": 36, "heads": 4}, ["odd", "RoPE"]),
        ({"kv_heads": 3}, ["model.kv_heads 3", "model.heads 4"]),
        ({"kv_heads": 0}, ["model.kv_heads is 0"]),
        ({"depth": 0}, ["model.depth is 0"]),
        ({"vocab_size": -1}, ["model.vocab_size is -1"]),
        ({"ffn_width": 0}, ["model.ffn_width is 0"]),
        ({"dropout": 1.0}, ["model.dropout is 1.0"]),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Transformer(tiny(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_sizes_follow_from_the_rest() -> None:
    config = ModelConfig(width=768, heads=12)
    assert (config.head_width, config.key_value_heads, config.feedforward_width) == (64, 12, 2048)
    assert ModelConfig(width=128).feedforward_width == 384  # 341.3, up to a multiple of 64
    assert ModelConfig(width=128, trunk="gpt").feedforward_width == 512
    assert not ModelConfig().is_tied
    assert ModelConfig(trunk="gpt").is_tied
    assert not ModelConfig(trunk="gpt", tied=False).is_tied


def test_dropout_acts_in_training_only() -> None:
    model = build(tiny(dropout=0.5))
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))
