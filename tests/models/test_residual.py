"""How branches join the stream: where a scheme starts, what learns first, dtypes, numbers that follow from depth.

Formulas of whole models are in test_baselines.py.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from models import Transformer
from models.config import ResidualConfig
from models.residual import Residual, build_residual
from tests.models.building import build, randn, tiny, tokens


def streams(model: Transformer) -> list[tuple[Tensor, Tensor]]:
    """What goes into each block and what comes out."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        for block in model.blocks
    ]
    model(tokens())
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("trunk", ["llama", "gpt"])
@pytest.mark.parametrize("plan", ["rezero", "skipinit", "nf", "fixup"])
@torch.no_grad()
def test_starts_as_the_identity(plan: str, trunk: str) -> None:
    """Of the embedding times sqrt(width), bit for bit; Fixup's untied head answers 0."""
    model = build(tiny(plan=plan, trunk=trunk, depth=3))
    for before, after in streams(model):
        assert torch.equal(before, after)
    x = model.embedding.weight[tokens()]
    x = (x if model.positions is None else x + model.positions.weight) * math.sqrt(32)
    head = model.embedding.weight if model.head is None else model.head.weight
    if plan == "fixup" and trunk == "llama":
        assert not head.any()
    torch.testing.assert_close(model(tokens()), x @ head.T)


def kind(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name)


def moved(model: Transformer, steps: int) -> set[str]:
    """Kinds of parameters that have a gradient other than 0 after so many steps of plain gradient descent."""
    for step in range(steps + 1):
        model(tokens(), tokens(seed=1))[0].backward()
        found = {kind(n) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        if step == steps:
            return found
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    raise AssertionError


@pytest.mark.parametrize(
    ("plan", "first"),
    [
        ("rezero", {"residual.both"}),
        ("skipinit", {"residual.attn", "residual.mlp"}),
        ("nf", {"residual.attn", "residual.mlp"}),
    ],
)
def test_the_scales_learn_first_and_then_all(plan: str, first: set[str]) -> None:
    """At scales of 0 the branches have no gradient; one step later everything has."""
    model = build(tiny(plan=plan, depth=2))
    everything = {kind(name) for name, _ in model.named_parameters()}
    assert moved(model, 0) == {"embedding.weight", "head.weight", "embedding_scale"} | first
    assert moved(build(tiny(plan=plan, depth=2)), 1) == everything


def test_fixup_wakes_up_from_its_end() -> None:
    """A head of 0 passes no gradient down, output projections of 0 none into branches: three steps to reach all."""
    config = tiny(plan="fixup", depth=2)
    everything = {kind(name) for name, _ in build(config).named_parameters()}
    assert moved(build(config), 0) == {"head.weight"}
    assert moved(build(config), 1) >= {
        "attention.out.weight",
        "feedforward.down.weight",
        "embedding.weight",
        "final.shift",
    }
    assert moved(build(config), 2) == everything


@pytest.mark.parametrize("scheme", ["rezero", "skipinit", "fixup", "layerscale", "scaled", "nf", "deepnorm"])
def test_the_stream_keeps_its_dtype_and_scales_are_fp32(scheme: str) -> None:
    """bf16 in and out, with one rounding at the end, and gradients of scales in fp32."""
    residual = build_residual(scheme, tiny(residual=ResidualConfig(scheme=scheme)), 1)  # type: ignore[arg-type]
    assert isinstance(residual, Residual)
    with torch.no_grad():
        for seed, parameter in enumerate(residual.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    x = randn(3, 32, dtype=torch.bfloat16).requires_grad_()
    y = randn(3, 32, seed=1, dtype=torch.bfloat16)
    for branch in (0, 1):
        out = residual(x, y, branch)
        entered = residual.enter(x, branch)
        assert out.dtype == entered.dtype == torch.bfloat16
        assert torch.equal(out, residual(x.float(), y.float(), branch).bfloat16())
        assert torch.equal(entered, residual.enter(x.float(), branch).bfloat16())
        out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in residual.parameters())


def test_plain_is_no_module() -> None:
    assert build_residual("plain", tiny(), 0) is None


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (2, {"scaled": 0.5, "nf": 0.2, "deepnorm": math.sqrt(2), "layerscale": 0.1}),
        (18, {"scaled": 1 / 6, "nf": 0.2, "deepnorm": math.sqrt(6), "layerscale": 0.1}),
        (24, {"scaled": 48**-0.5, "nf": 0.2, "deepnorm": 48**0.25, "layerscale": 1e-5}),
        (25, {"scaled": 50**-0.5, "nf": 0.2, "deepnorm": 50**0.25, "layerscale": 1e-6}),
    ],
)
def test_numbers_that_follow_from_depth(depth: int, expected: dict[str, float]) -> None:
    for scheme, value in expected.items():
        config = tiny(plan="none", depth=depth, width=8, residual=ResidualConfig(scheme=scheme))  # type: ignore[arg-type]
        residual = build(config).blocks[0].residual
        found = residual.mlp[3].item() if scheme == "layerscale" else residual.constant
        assert found == pytest.approx(value), scheme


@pytest.mark.parametrize(("scheme", "start"), [("rezero", 0.0), ("skipinit", 0.0), ("nf", 0.0), ("fixup", 1.0)])
def test_scales_start_where_their_sources_or_the_user_say(scheme: str, start: float) -> None:
    for initial, expected in ((None, start), (0.3, 0.3), (0.0, 0.0)):
        config = tiny(plan="none", residual=ResidualConfig(scheme=scheme, initial=initial))  # type: ignore[arg-type]
        model = build(config)
        values = [p.item() for n, p in model.named_parameters() if ".residual." in n]
        assert values == pytest.approx([expected] * len(values))
        assert values


def test_nf_divides_by_the_streams_own_spread() -> None:
    """Branches of unit variance and scales of 1: what each branch reads has unit variance, to five standard errors of a
    sample of 4 million."""
    config = tiny(plan="none", depth=4, residual=ResidualConfig(scheme="nf", initial=1.0, constant=0.5))
    blocks = [block.residual for block in build(config).blocks]
    x = randn(2000, 2000)
    with torch.no_grad():
        for index, residual in enumerate(blocks):
            for branch in (0, 1):
                assert residual.enter(x, branch).std().item() == pytest.approx(1.0, abs=5 / math.sqrt(2 * x.numel()))
                x = residual(x, randn(2000, 2000, seed=1 + 2 * index + branch), branch)
    assert x.var().item() == pytest.approx(1 + 8 * 0.25, rel=0.01)


def test_roles_and_names() -> None:
    rezero = build(tiny(plan="rezero", depth=1)).blocks[0].residual
    assert [name for name, _ in rezero.named_parameters()] == ["both"]
    skipinit = build(tiny(plan="skipinit", depth=1)).blocks[0].residual
    assert [name for name, _ in skipinit.named_parameters()] == ["attn", "mlp"]
    assert all(p.shape == (1,) for p in nn.ModuleList([rezero, skipinit]).parameters()), "FSDP2 rejects 0-d parameters"
