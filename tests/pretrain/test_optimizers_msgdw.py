"""mSGDW against the formula written out for one number at a time, and against other people's SGD."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
import types
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode

from models.errors import ConfigError
from pretrain.optimizers import MSGDW, slices
from tests.pretrain import stepping

SHAPES = [(3, 2), (1,), (4,), (0, 5)]


parameters = partial(stepping.parameters, SHAPES)
gradients = partial(stepping.gradients, SHAPES)
train = partial(stepping.train, gradients=gradients, lr=lambda step: 0.3 / (1 + step))


def reference(
    p: float, gs: list[float | None], lrs: list[float], mu: float, wd: float, damp: float, nesterov: bool
) -> float:
    """One scalar parameter in Python floats (fp64); a gradient None leaves parameter and momentum alone."""
    m = None
    for g, lr in zip(gs, lrs, strict=True):
        if g is None:
            continue
        p = p - lr * wd * p
        m = g if m is None else mu * m + (1 - damp) * g
        p = p - lr * (g + mu * m if nesterov else m)
    return p


@settings(max_examples=60)
@given(
    mu=st.floats(0.0, 0.99),
    wd=st.floats(0.0, 1.0),
    damp=st.floats(0.0, 0.9),
    nesterov=st.booleans(),
    lrs=st.lists(st.floats(0.0, 0.9), min_size=1, max_size=6),
    skips=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=4),
    chunk=st.sampled_from([1, 5, 2**24]),
)
def test_every_element_follows_the_formula(
    mu: float,
    wd: float,
    damp: float,
    nesterov: bool,
    lrs: list[float],
    skips: set[tuple[int, int]],
    chunk: int,
) -> None:
    if nesterov:
        mu, damp = max(mu, 0.1), 0.0
    held = parameters(torch.float64)
    before = [parameter.detach().clone() for parameter in held]
    optimizer = MSGDW(held, 0.0, mu, wd, damp, nesterov, state_dtype=torch.float64)
    seen: list[list[Tensor | None]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "CHUNK_ELEMENTS_CPU", chunk)
        for step, lr in enumerate(lrs):
            seen.append([None if (step, i) in skips else g for i, g in enumerate(gradients(step, torch.float64))])
            for parameter, gradient in zip(held, seen[-1], strict=True):
                parameter.grad = gradient
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    for i, (start, parameter) in enumerate(zip(before, held, strict=True)):
        expected = []
        for j, p in enumerate(start.flatten().tolist()):
            gs = [None if step[i] is None else step[i].flatten()[j].item() for step in seen]
            expected.append(reference(p, gs, lrs, mu, wd, damp, nesterov))
        # fp64 on both sides; six steps of differently associated sums of numbers near 1
        torch.testing.assert_close(parameter.detach().flatten().tolist(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)]
)
def test_without_decay_it_is_torch_sgd(momentum: float, dampening: float, nesterov: bool) -> None:
    ours, theirs = parameters(), parameters()
    train(MSGDW(ours, 0.1, momentum, dampening=dampening, nesterov=nesterov), range(8))
    train(torch.optim.SGD(theirs, 0.1, momentum, dampening, nesterov=nesterov, foreach=False), range(8))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # a few roundings of fp32


def timm_sgdw() -> type[torch.optim.Optimizer]:
    """timm's SGDW without timm's models, which need torchvision: its optimizers import only torch."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    package = types.ModuleType("timm_optimizers")
    package.__path__ = [f"{spec.submodule_search_locations[0]}/optim"]
    sys.modules["timm_optimizers"] = package
    return importlib.import_module("timm_optimizers.sgdw").SGDW


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_it_is_timm_sgdw(dampening: float) -> None:
    ours, theirs = parameters(), parameters()
    train(MSGDW(ours, 0.1, 0.9, 0.1, dampening), range(8))
    other = timm_sgdw()(
        theirs, lr=0.1, momentum=0.9, weight_decay=0.1, dampening=dampening, nesterov=False, foreach=False
    )
    train(other, range(8))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # a few roundings of fp32


def test_decay_is_applied_once_to_each_parameter_of_a_mixed_group() -> None:
    """timm's multi-tensor path decays once for every (device, dtype) in the group."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float32]
    held = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    for parameter in held:
        parameter.grad = torch.zeros_like(parameter)
    MSGDW(held, lr=0.5, weight_decay=0.5).step()
    for parameter in held:
        assert parameter.tolist() == [0.75] * 3


def test_a_parameter_without_gradient_is_left_alone() -> None:
    moved, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    moved.grad = torch.ones(2)
    optimizer = MSGDW([moved, still], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert still not in optimizer.state


def test_bf16_momentum_is_rounded_once_a_step_and_moves_the_parameter_unrounded() -> None:
    """Bitwise: the same fp32 operations in the same order, then one rounding to nearest."""
    held = parameters()
    expected = [parameter.detach().clone() for parameter in held]
    moments = [torch.zeros_like(p, dtype=torch.bfloat16) for p in expected]
    optimizer = MSGDW(held, 0.1, 0.9, state_dtype=torch.bfloat16, state_rounding="nearest")
    train(optimizer, range(6))
    for step in range(6):
        for p, m, g in zip(expected, moments, gradients(step), strict=True):
            exact = m.float() * 0.9 + g
            p.add_(exact, alpha=-0.3 / (1 + step))
            m.copy_(exact)
    for parameter, p, m in zip(held, expected, moments, strict=True):
        assert torch.equal(parameter, p)
        stored = optimizer.state[parameter]["momentum_buffer"]
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, m)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
def test_state_dict_keeps_every_bit_of_the_momentum(parameter_dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    held = parameters(parameter_dtype)
    optimizer = MSGDW(held, 0.1, state_dtype=state_dtype)
    train(optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = parameters(parameter_dtype, seed=7)
    other = MSGDW(copies, 0.1, state_dtype=state_dtype)
    other.load_state_dict(torch.load(file, weights_only=True))
    for parameter, copy in zip(held, copies, strict=True):
        loaded = other.state[copy]["momentum_buffer"]
        assert loaded.dtype == state_dtype
        assert torch.equal(loaded, optimizer.state[parameter]["momentum_buffer"])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList(parameters())


def optimizer_of(model: nn.Module, state_dtype: torch.dtype) -> MSGDW:
    held = list(model.named_parameters())
    groups = [
        {"params": held[:2], "weight_decay": 0.1, "role": "matrix", "lr_factor": 1.0},
        {"params": held[2:], "weight_decay": 0.0, "role": "gain", "lr_factor": 1.0},
    ]
    return MSGDW(groups, 0.1, state_dtype=state_dtype)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_resume_through_distributed_state_dict_is_bitwise(state_dtype: torch.dtype, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    whole = Small()
    train(optimizer_of(whole, state_dtype), range(6))

    first = Small()
    optimizer = optimizer_of(first, state_dtype)
    get_optimizer_state_dict(first, optimizer)  # a look before the first step must not change the run
    train(optimizer, range(3))
    saved = get_optimizer_state_dict(first, optimizer, options=options)

    second = Small()
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second, state_dtype)
    set_optimizer_state_dict(second, resumed, saved, options=options)
    assert all(state["momentum_buffer"].dtype == state_dtype for state in resumed.state.values())
    assert [group["role"] for group in resumed.param_groups] == ["matrix", "gain"]
    train(resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


class RefuseReadback(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_step_reads_nothing_back(state_dtype: torch.dtype) -> None:
    optimizer = MSGDW(parameters(), 0.1, 0.9, 0.1, nesterov=True, state_dtype=state_dtype)
    with RefuseReadback():
        train(optimizer, range(2))
        with pytest.raises(AssertionError):
            torch.ones(1).item()  # the mode does see a readback


def test_closure_runs_with_gradients() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = MSGDW([p], lr=0.25)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert p.item() == 1.0


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"lr": -0.1}, "optimizer.lr"),
        ({"lr": float("nan")}, "optimizer.lr"),
        ({"lr": 0.1, "momentum": 1.0}, "optimizer.momentum"),
        ({"lr": 0.1, "weight_decay": -1.0}, "optimizer.weight_decay"),
        ({"lr": 0.1, "dampening": 1.0}, "optimizer.dampening"),
        ({"lr": 0.1, "dampening": 0.1, "nesterov": True}, "optimizer.nesterov"),
        ({"lr": 0.1, "momentum": 0.0, "nesterov": True}, "optimizer.nesterov"),
    ],
)
def test_settings_out_of_range_are_the_users_mistake(arguments: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        MSGDW(parameters(), **arguments)
