"""First weights: by name and seed alone, with the right spread, and alphas by each of their rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from models import SITES, ConfigError, ModelConfig, Transformer, parameter_roles
from models.alpha import alpha_by_width
from models.config import AlphaConfig, InitConfig
from models.initialization import initialize, measure_alpha
from tests.models.building import build, scrambled, tiny, tokens


def weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in build(config, seed).named_parameters()}


def drawn(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights(config, seed).items() if tensor.ndim == 2}


def test_seed_and_name_alone_decide() -> None:
    """Neither what torch drew before, nor what else is in the model, nor the order matter."""
    torch.manual_seed(1)
    first = weights(tiny(plan="llama", depth=1))
    torch.manual_seed(2)
    other = weights(tiny(plan="dnt-s4", depth=1, sites={"mlp_mid": "derf"}))
    for name in first:
        assert torch.equal(first[name], other[name]), name


def test_seeds_and_names_differ() -> None:
    zero, one = drawn(tiny(depth=2), seed=0), drawn(tiny(depth=2), seed=1)
    for name in zero:
        assert not torch.equal(zero[name], one[name]), name
    tensors = [*zero.items(), *((f"{name} of seed 1", tensor) for name, tensor in one.items())]
    for i, (name, a) in enumerate(tensors):
        for other, b in tensors[:i]:
            n = min(a.numel(), b.numel())
            assert not torch.equal(a.flatten()[:n], b.flatten()[:n]), (name, other)


@pytest.mark.parametrize("trunk", ["llama", "gpt"])
@pytest.mark.parametrize("plan", ["derf", "gpt", "dnt"])
def test_vectors_start_where_their_role_says(plan: str, trunk: str) -> None:
    model = scrambled(tiny(plan=plan, trunk=trunk, bias=True))
    initialize(model, model.config, seed=0)
    start = {"gain": 1.0, "shift": 0.0, "bias": 0.0, "scale": math.sqrt(32)}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if roles[name] in start:
            torch.testing.assert_close(parameter.detach(), torch.full(parameter.shape, start[roles[name]]))


def roomy(**init: object) -> dict[str, Tensor]:
    return drawn(tiny(width=64, ffn_width=128, depth=8, vocab_size=301, init=InitConfig(**init)))


def close(tensor: Tensor, std: float) -> bool:
    """The sample standard deviation of n normal numbers is std (1 +- 1/sqrt(2 n)): five of those; the mean alike."""
    n = tensor.numel()
    return bool(
        abs(tensor.std().item() / std - 1) < 5 / math.sqrt(2 * n) and abs(tensor.mean().item()) < 5 * std / math.sqrt(n)
    )


def std_of(name: str, base: float, embedding: float = 0.02, head: float | None = None, depth: float = 4.0) -> float:
    if "embedding" in name:
        return embedding
    if name == "head.weight":
        return base if head is None else head
    return base / depth if "attention.out" in name or "feedforward.down" in name else base  # sqrt(2 * 8) = 4


def test_std_by_role() -> None:
    for name, tensor in roomy().items():
        assert close(tensor, std_of(name, 0.02)), name
    for name, tensor in roomy(std=0.05, embedding_std=1.0, head_std=0.001, depth_scaled_output=False).items():
        assert close(tensor, std_of(name, 0.05, 1.0, 0.001, depth=1.0)), name


def test_fan_in() -> None:
    for name, tensor in roomy(std="fan_in").items():
        fan_in = 128 if "feedforward.down" in name else 64
        assert close(tensor, std_of(name, fan_in**-0.5)), name


def test_trunc_normal_is_cut_at_two_standard_deviations() -> None:
    """A normal cut there has the standard deviation sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)) = 0.8796 of the uncut."""
    for name, tensor in roomy(distribution="trunc_normal").items():
        std = std_of(name, 0.02)
        assert tensor.abs().max() <= 2 * std * (1 + 1e-6), name
        assert tensor.abs().max() > 1.9 * std, name
        assert close(tensor, 0.8796 * std), name


def test_gpt_positions_start_as_embeddings() -> None:
    tensor = drawn(tiny(trunk="gpt", context=256))["positions.weight"]
    assert close(tensor, 0.02)


def alphas(model: nn.Module) -> dict[str, float]:
    return {n.removesuffix(".alpha"): p.item() for n, p in model.named_parameters() if n.endswith(".alpha")}


def everywhere(rule: AlphaConfig, **changes: object) -> ModelConfig:
    return tiny(plan="none", sites=dict.fromkeys(SITES, "dyt"), alpha=rule, **changes)


def is_attention(name: str) -> bool:
    return ".attention." in name or name.endswith(("attn_in", "attn_out", "attn_post"))


def test_alpha_constant() -> None:
    values = alphas(build(everywhere(AlphaConfig(rule="constant", constant=0.75))))
    assert len(values) == 2 + 12 * 2
    assert set(values.values()) == {0.75}


def test_alpha_by_role() -> None:
    for name, value in alphas(build(everywhere(AlphaConfig(rule="role", attention=0.75, other=0.25)))).items():
        assert value == (0.75 if is_attention(name) else 0.25), name


@pytest.mark.parametrize(
    ("width", "attention", "other"),
    [
        (32, 1.0, 1.0),  # beyond the table: its first row
        (1024, 1.0, 1.0),
        (1536, 1.0, 0.67),
        (2048, 1.0, 0.5),
        (2560, 0.93, 0.37),
        (3072, 0.88, 0.29),
        (3200, 0.87, 0.28),
        (4096, 0.8, 0.2),
        (6656, 0.30, 0.08),
        (8192, 0.2, 0.05),
        (16384, 0.2, 0.05),
    ],
)
def test_alpha_by_width(width: int, attention: float, other: float) -> None:
    """The paper's rows, and between them its log-log interpolation to two decimals."""
    assert alpha_by_width(width) == pytest.approx((attention, other), abs=0.005)


def test_alpha_by_width_in_a_model() -> None:
    model = build(everywhere(AlphaConfig(), width=1536, heads=2, ffn_width=8, depth=1, vocab_size=2))
    for name, value in alphas(model).items():
        assert value == pytest.approx(1.0 if is_attention(name) else 0.6667, abs=1e-4), name


def input_stds(model: nn.Module, ids: Tensor) -> dict[str, float]:
    seen: dict[str, float] = {}

    def look(name: str):  # type: ignore[no-untyped-def]
        return lambda module, inputs: seen.__setitem__(name, inputs[0].double().std().item())

    handles = [
        module.register_forward_pre_hook(look(name))
        for name, module in model.named_modules()
        if hasattr(module, "alpha")
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("plan", ["dyt", "derf", "everywhere"])
@pytest.mark.parametrize("target", [1.0, 0.5])
def test_alpha_measured(plan: str, target: float) -> None:
    """Afterwards alpha times the spread of its site's input is the target, at every site, on that batch."""
    rule = AlphaConfig(rule="measured", target=target)
    model = build(everywhere(rule) if plan == "everywhere" else tiny(plan=plan, alpha=rule))
    assert set(alphas(model).values()) == {1.0}  # until measured
    returned = measure_alpha(model, lambda: model(tokens()), target)
    values, stds = alphas(model), input_stds(model, tokens())
    assert set(values) == set(stds) == set(returned)
    assert values == pytest.approx(returned)
    for name, value in values.items():
        assert value * stds[name] == pytest.approx(target, rel=1e-4), name  # fp32 sums of up to 1,280 terms
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_alpha_measured_on_a_constant_input_is_the_users_mistake() -> None:
    model = build(tiny(plan="dyt"))
    torch.nn.init.zeros_(model.embedding.weight)
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn_in has standard deviation 0\.0"):
        measure_alpha(model, lambda: model(tokens()), 1.0)
    assert not any(module._forward_pre_hooks for module in model.modules()), "hooks stay behind"


def test_a_model_made_on_the_meta_device_is_the_same() -> None:
    config = tiny(plan="dyt")
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    initialize(model, config, seed=3)
    for name, tensor in weights(config, seed=3).items():
        assert torch.equal(model.get_parameter(name), tensor), name
