"""Lion against the formula written out for one number at a time, and against timm's."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.optimizers import Lion, slices
from tests.pretrain import stepping

SHAPES = [(3, 2), (1,), (4,), (0, 5)]


parameters = partial(stepping.parameters, SHAPES)
gradients = partial(stepping.gradients, SHAPES)


def train(optimizer: torch.optim.Optimizer, lrs: list[float]) -> None:
    stepping.train(optimizer, range(len(lrs)), gradients, lrs.__getitem__)


def reference(p: float, gs: list[float], lrs: list[float], beta1: float, beta2: float, wd: float) -> float:
    """One number in Python's floats, arXiv 2302.06675, algorithm 2."""
    m = 0.0
    for g, lr in zip(gs, lrs, strict=True):
        c = beta1 * m + (1 - beta1) * g
        p = p - lr * ((c > 0) - (c < 0) + wd * p)
        m = beta2 * m + (1 - beta2) * g
    return p


@settings(max_examples=40)
@given(
    beta1=st.floats(0.0, 0.99),
    beta2=st.floats(0.0, 0.99),
    wd=st.floats(0.0, 1.0),
    lrs=st.lists(st.floats(0.0, 0.9), min_size=1, max_size=6),
    chunk=st.sampled_from([1, 5, 2**24]),
)
def test_every_element_follows_the_formula(beta1: float, beta2: float, wd: float, lrs: list[float], chunk: int) -> None:
    held = parameters(torch.float64)
    before = [parameter.detach().clone() for parameter in held]
    optimizer = Lion(held, 0.0, (beta1, beta2), wd, state_dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "CHUNK_ELEMENTS_CPU", chunk)
        train(optimizer, lrs)
    for i, (start, parameter) in enumerate(zip(before, held, strict=True)):
        gs = [gradients(step, torch.float64)[i].flatten().tolist() for step in range(len(lrs))]
        expected = [
            reference(p, [g[j] for g in gs], lrs, beta1, beta2, wd) for j, p in enumerate(start.flatten().tolist())
        ]
        # fp64 on both sides; a sign turns only where a sum of numbers near 1 is within rounding of 0
        torch.testing.assert_close(parameter.detach().flatten().tolist(), expected, rtol=1e-12, atol=1e-12)


def test_it_is_timms() -> None:
    """timm's optimizers without its models, which need torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    package = types.ModuleType("timm_optimizers")
    package.__path__ = [f"{spec.submodule_search_locations[0]}/optim"]
    sys.modules["timm_optimizers"] = package
    other = importlib.import_module("timm_optimizers.lion").Lion
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = Lion(ours, 0.1, weight_decay=0.1)
    reference = other(theirs, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, foreach=False)
    lrs = [0.1 / (1 + step) for step in range(8)]
    train(optimizer, lrs)
    train(reference, lrs)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # a few roundings of fp32
    for mine, other_one in zip(ours, theirs, strict=True):
        assert optimizer.state[mine].keys() == reference.state[other_one].keys()


def test_bf16_moments_are_rounded_once_a_step_and_decide_the_sign_unrounded() -> None:
    """Bitwise: the same fp32 operations in the same order, then one rounding to nearest."""
    held = parameters(torch.float32)
    expected = [parameter.detach().clone() for parameter in held]
    moments = [torch.zeros_like(p, dtype=torch.bfloat16) for p in expected]
    optimizer = Lion(held, 0.1, state_dtype=torch.bfloat16, state_rounding="nearest")
    lrs = [0.3 / (1 + step) for step in range(6)]
    train(optimizer, lrs)
    for step, lr in enumerate(lrs):
        for p, m, g in zip(expected, moments, gradients(step, torch.float32), strict=True):
            wide = m.float()
            p.add_((wide * 0.9).add_(g, alpha=1 - 0.9).sign_(), alpha=-lr)
            m.copy_(wide.mul_(0.99).add_(g, alpha=1 - 0.99))
    for parameter, p, m in zip(held, expected, moments, strict=True):
        assert torch.equal(parameter, p)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], m)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1)])
def test_betas_out_of_range_are_one_line(betas: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lion\.beta[12] is"):
        Lion(parameters(torch.float32), 0.1, betas)
