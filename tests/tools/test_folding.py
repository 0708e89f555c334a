"""Gains folded into the next linears: what is folded, what is left, and that the function stays."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import ConfigError, ModelConfig, Transformer, parameter_roles
from models.norms import NORMS
from models.plan import BLOCK_SITES, SITES, resolve_plan
from models.roles import Role
from tests.models.building import scrambled, tiny, tokens
from tools.formats.folding import fold
from tools.formats.lazy import LazyTensor
from tools.formats.weights import Weights, run_config

LLAMA: dict[str, Any] = {"plan": "llama", "trunk": "llama"}
GPT: dict[str, Any] = {"plan": "gpt", "trunk": "gpt", "bias": True}
# Of the largest logit. A product more and one less are roundings of 2^-53, which the layers make some hundred times
# larger; a gain that is left out moves logits by tenths of themselves.
EXACT = 1e-11


def weights_of(model: nn.Module, config: ModelConfig) -> Weights:
    def lazy(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().clone())

    return Weights(run_config(config), {name: lazy(tensor) for name, tensor in model.named_parameters()})


def with_gain_or_shift(config: ModelConfig) -> set[str]:
    """The norms of a model that have one, by their modules' names. Derf's scalar shift is inside the function."""
    found = set()
    for name, module in Transformer(config).named_modules():
        if name.split(".")[-1] in SITES:
            roles = {leaf: role for leaf, role in parameter_roles(module).items() if leaf != "shift"}
            found |= {name} if {"gain", "shift"} & set(roles.values()) else set()
    return found


@torch.no_grad()
def folded(config: ModelConfig) -> tuple[ModelConfig, str]:
    """A model of random gains and shifts is folded in fp64 and computes the same. (the result's configuration, note)"""
    ours = scrambled(config, dtype=torch.float64)
    weights, note = fold(weights_of(ours, config), None)
    result = Transformer(weights.config.model).double()
    result.load_state_dict({name: tensor.read() for name, tensor in weights.model.items()}, strict=True)
    text = tokens(vocabulary=config.vocabulary)
    expected = ours(text)
    assert (result(text) - expected).abs().max() <= EXACT * expected.abs().max()
    return weights.config.model, note


FOLDED = " folded into the next linears"
CASES: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "llama": (LLAMA, set(), f"gains of attn_in, mlp_in, final{FOLDED}"),
    "llama, tied, grouped": (
        {**LLAMA, "tied": True, "kv_heads": 2, "bias": True},
        {"final"},
        f"gains of attn_in, mlp_in{FOLDED}; left: final (the head is tied)",
    ),
    "gpt": (GPT, {"final"}, f"gains and shifts of attn_in, mlp_in{FOLDED}; left: final (the head is tied)"),
    "gpt, untied": (
        {**GPT, "tied": False},
        {"final"},
        f"gains and shifts of attn_in, mlp_in{FOLDED}; left: final (the next linear has no bias for its shift)",
    ),
    "gpt, without biases": ({**GPT, "bias": False, "tied": False}, set(), f"gains of attn_in, mlp_in, final{FOLDED}"),
    "gpt, a shift in one norm alone": (
        {**GPT, "bias": False, "sites": {"mlp_in": {"function": "layernorm", "bias": True}}},
        {"mlp_in", "final"},
        f"gains of attn_in{FOLDED}; left: mlp_in (the next linear has no bias for its shift), final (the head is tied)",
    ),
    "dyt": ({"plan": "dyt"}, set(), f"gains of attn_in, mlp_in, final{FOLDED}"),
    "derf": (
        {"plan": "derf", "bias": True},
        {"final"},
        f"gains and shifts of attn_in, mlp_in{FOLDED}; left: final (the next linear has no bias for its shift)",
    ),
    "dnt": (
        {"plan": "dnt"},
        {"embed", "query", "key", "attn_out", "mlp_out"},
        f"gains of attn_in, final{FOLDED}; left: embed, query, key, attn_out, mlp_out (no linear comes next)",
    ),
    "a fixed alpha, functions around": (
        {**LLAMA, "sites": {"attn_in": {"function": "isru", "alpha": 0.5}, "value": "rmsnorm", "mlp_act": "hardtanh"}},
        {"value", "mlp_act"},
        f"gains of attn_in, mlp_in, final{FOLDED}; left: value, mlp_act (no linear comes next)",
    ),
    "weights made anew": (
        {**LLAMA, "weights": "standardized"},
        {"attn_in", "mlp_in"},
        f"gains of final{FOLDED}; left: attn_in, mlp_in (the next linear's weight is standardized)",
    ),
    "sub-ln": ({"plan": "sub-ln"}, set(), f"gains of attn_in, attn_mid, mlp_in, mlp_mid, final{FOLDED}"),
    "sub-ln of Derf on the gpt trunk": (
        {"plan": "sub-ln", "trunk": "gpt", "bias": True, "sites": {"attn_mid": "derf", "mlp_mid": "derf"}},
        {"final"},
        f"gains of attn_in, mlp_in, gains and shifts of attn_mid, mlp_mid{FOLDED}; left: final (the head is tied)",
    ),
    "a shift alone": (
        {
            **LLAMA,
            "bias": True,
            "sites": {"mlp_in": {"function": "dyt", "beta": True, "gain": False}, "final": "l2norm"},
        },
        set(),
        f"gains of attn_in, shifts of mlp_in{FOLDED}; left: final (no gain there)",
    ),
}


@pytest.mark.parametrize(("shape", "left", "note"), CASES.values(), ids=CASES)
def test_what_can_be_folded_is_and_nothing_else(shape: dict[str, Any], left: set[str], note: str) -> None:
    config, said = folded(tiny(**shape))
    assert {name.split(".")[-1] for name in with_gain_or_shift(config)} == left
    assert said == note


def test_the_first_blocks_have_their_own() -> None:
    """Pre-norms there and post-norms elsewhere, then the other way round; where all blocks are first, and none."""
    first = {"attn_in": "rmsnorm", "mlp_in": {"function": "dyt", "beta": True}, "attn_post": None}
    shape = {"plan": "post", "depth": 3, "first_sites": first, "sites": {"mlp_in": "rmsnorm", "final": "rmsnorm"}}
    config, note = folded(tiny(**shape, first_blocks=1))
    left = {"blocks.0.mlp_in", "blocks.0.mlp_post"} | {
        f"blocks.{i}.{s}" for i in (1, 2) for s in ("attn_post", "mlp_post")
    }
    assert with_gain_or_shift(config) == left
    assert note == (
        "gains of attn_in of the first blocks, mlp_in, final folded into the next linears; left: attn_post, mlp_post "
        "(no linear comes next), mlp_in of the first blocks (the next linear has no bias for its shift)"
    )
    assert config.first_sites == first | {"attn_in": {"function": "rmsnorm", "gain": False}}
    config, note = folded(tiny(**shape, first_blocks=3, bias=True))
    assert with_gain_or_shift(config) == {f"blocks.{i}.mlp_post" for i in range(3)}
    assert "gains and shifts of mlp_in of the first blocks" in note
    config, _ = folded(tiny(plan="mix-ln", depth=4))
    assert with_gain_or_shift(config) == {"blocks.0.attn_post", "blocks.0.mlp_post"}


SHIFTS = {"rmsnorm": None, "layernorm": "bias", "dyt": "beta", "derf": "beta", "isru": "beta"}
UNREAD = {"embed", "query", "key", "value", "attn_out", "attn_post", "mlp_act", "mlp_out", "mlp_post"}


@st.composite
def entries(draw: st.DrawFn, sites: tuple[str, ...]) -> dict[str, Any]:
    """Any function at any site, with and without gain and shift."""
    found: dict[str, Any] = {}
    for site in sites:
        function = draw(st.sampled_from([None, "l2norm", *SHIFTS]))
        found[site] = function
        if function in SHIFTS:
            found[site] = {"function": function, "gain": draw(st.booleans())}
            if SHIFTS[function]:
                found[site][SHIFTS[function]] = draw(st.booleans())
    return found


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    first = draw(st.sampled_from([0, 0, 1, 2]))
    return tiny(
        plan="none",
        sites=draw(entries(SITES)),
        first_blocks=first,
        first_sites=draw(entries(BLOCK_SITES)) if first else {},
        weights=draw(st.sampled_from(["plain", "plain", "plain", "standardized", "sigma"])),
        trunk=draw(st.sampled_from(["llama", "gpt"])),
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        qk_scope=draw(st.sampled_from(["head", "projection"])),
        bias=draw(st.booleans()),
        tied=draw(st.booleans()),
    )


@settings(max_examples=80, derandomize=True)
@given(config=models())
def test_any_model_keeps_its_function(config: ModelConfig) -> None:
    def stays(name: str) -> bool:
        site = name.split(".")[-1]
        index = int(name.split(".")[1]) if site in BLOCK_SITES else config.depth
        entry: Any = resolve_plan(config).of_block(index, config.depth).sites[site]
        shifted = entry.get("bias") or entry.get("beta")
        if site == "final":
            return bool(shifted or config.is_tied)
        return bool(site in UNREAD or (shifted and not config.bias) or config.weights != "plain")

    before = with_gain_or_shift(config)
    kept = {name for name in before if stays(name)}
    if kept == before:
        with pytest.raises(ConfigError, match="there is nothing to fold"):
            fold(weights_of(scrambled(config), config), None)
    else:
        assert with_gain_or_shift(folded(config)[0]) == kept


def test_a_function_that_is_not_known_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(nn.Module):
        roles: ClassVar[dict[str, Role]] = {"weight": "gain"}

        def __init__(self, features: int, *, eps: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(features))

        def forward(self, x: Tensor) -> Tensor:
            return x / (1 + (self.weight * x).abs())

    monkeypatch.setitem(NORMS, "mine", Mine)
    config, note = folded(tiny(**LLAMA, sites={"mlp_in": "mine"}))
    assert with_gain_or_shift(config) == {"blocks.0.mlp_in", "blocks.1.mlp_in"}
    assert "left: mlp_in (what mine does with its gain is not known here)" in note


def test_products_are_made_in_fp32_one_at_a_time() -> None:
    """bf16 weights and fp32 gains, as our folders have them: rounded once, and nothing is read before its turn."""
    config = tiny(**GPT)
    ours = {name: tensor.detach() for name, tensor in scrambled(config).named_parameters()}
    ours = {name: tensor if ".attn_in." in name else tensor.bfloat16() for name, tensor in ours.items()}
    reads: Counter[str] = Counter()

    def lazy(name: str) -> LazyTensor:
        def read() -> Tensor:
            reads[name] += 1
            return ours[name].clone()

        return LazyTensor(tuple(ours[name].shape), ours[name].dtype, read)

    weights, _ = fold(Weights(run_config(config), {name: lazy(name) for name in ours}), None)
    assert not reads
    weight, gain, shift = (ours[f"blocks.0.{n}"] for n in ("attention.q.weight", "attn_in.weight", "attn_in.bias"))
    product = weights.model["blocks.0.attention.q.weight"]
    assert (product.shape, product.dtype) == (weight.shape, torch.bfloat16)
    assert product.read().equal((weight.double() * gain.double()).bfloat16())
    assert reads == {"blocks.0.attention.q.weight": 1, "blocks.0.attn_in.weight": 1}
    bias = ours["blocks.0.attention.q.bias"].double() + weight.double() @ shift.double()
    # half a place of bf16, and in fp32 as many roundings as there are columns
    torch.testing.assert_close(weights.model["blocks.0.attention.q.bias"].read().double(), bias, rtol=2**-8, atol=1e-6)
    wide, _ = fold(Weights(run_config(config), {name: lazy(name) for name in ours}), torch.float32)
    assert (
        wide.model["blocks.0.attention.q.weight"]
        .read()
        .double()
        .allclose(weight.double() * gain.double(), rtol=2**-24, atol=0)
    )
