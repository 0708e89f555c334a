"""Every kernel that is timed computes what its plain counterpart computes, and the bytes are the operation's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.errors import ConfigError
from tools.benching import kernels
from tools.benching.operations import CASES, Case, Shapes

CPU = torch.device("cpu")
SMALL = Shapes(tokens=12, width=16, heads=2, ffn_width=20, vocabulary=24, length=6, dtype=torch.float32)


def with_gradients(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    own = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
    results = function(*own)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(1)
    gradients = [torch.randn(result.shape) for result in results]  # the same numbers whatever the strides
    wanted = [tensor for tensor in own if tensor.requires_grad]
    return [*results, *torch.autograd.grad(results, wanted, gradients)]


@pytest.mark.parametrize("name", [name for name in CASES if name != "cross_entropy"])
def test_what_is_compared_is_the_same_function(name: str) -> None:
    case = CASES[name]
    tensors, unit = case.make(SMALL, CPU)
    features = SMALL.ffn_width if name == "silu_mul" else SMALL.width
    assert unit == 12 * features * 4
    found, expected = (with_gradients(function, tensors) for function in (case.ours, case.plain))
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)  # fp32, other orders of sums


def test_the_fused_loss_leaves_the_gradient_in_the_logits_place() -> None:
    case = CASES["cross_entropy"]
    (logits, targets), unit = case.make(SMALL, CPU)
    assert unit == 12 * 24 * 4
    own = logits.clone()
    case.ours(own, targets)
    torch.testing.assert_close(own, case.plain(logits, targets), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_no_pass_moves_less_than_its_operands_and_results(name: str) -> None:
    """Forward: tensors of the operation's size that go in and come out. Backward: gradients of results and operands,
    where they differ, and at least one tensor that the forward has kept, but for RoPE, which keeps none."""
    case = CASES[name]
    tensors, unit = case.make(SMALL, CPU)
    whole = [tensor for tensor in tensors if tensor.numel() * 4 == unit]
    if name == "cross_entropy":
        assert case.passes == (2, 0)
        return
    results = case.plain(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    shared = 1 if "add" in name else 0  # x and its branch have one gradient, or x's is its result's
    kept = {"rotate": 0, "silu_mul": 2}.get(name, 1)
    assert case.passes[0] == len(whole) + len(results)
    if name == "rms_norm_add_rms_norm":  # keeps branch and stream, and their gradients differ
        shared, kept = 0, 2
    assert case.passes[1] == len(results) + len(whole) - shared + kept


def test_a_table_has_every_way_or_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1 GB/s dyt's two passes of 768 bytes take 1.536 us, backward three of them 2.304."""
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(CASES, "broken", Case(broken, *(getattr(CASES["dyt"], n) for n in ("plain", "make", "passes"))))
    forward, backward = kernels.measure(["dyt", "derf", "broken"], SMALL, CPU, 2, against_liger=True)
    rows = {row.name: row for row in forward.rows}
    ways = ("twin in PyTorch", "eager", "torch.compile", "triton", "liger")
    assert [name for name in rows if name.startswith("dyt")] == [f"dyt: {way}" for way in ways]
    assert rows["dyt: triton"].why == "kernels: not measured without a GPU"
    assert rows["dyt: liger"].why == "not measured without a GPU"
    assert rows["derf: liger"].why == "it has none"
    assert rows["broken: twin in PyTorch"].why == "failed: no such kernel"
    assert len(rows["broken: eager"].values) == 2
    assert rows["dyt: eager"].limit == pytest.approx(2 * 12 * 16 * 4 / 1e3)
    assert backward.rows[0].limit == pytest.approx(3 * 12 * 16 * 4 / 1e3)
    assert min(rows["dyt: eager"].values) > 0


def broken(*_: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nat all")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"tokens": 0}, "--tokens is 0"), ({"tokens": 10}, "--tokens 10 is not a multiple of --length 2048")],
)
def test_shapes_are_checked(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Shapes(**sizes)
