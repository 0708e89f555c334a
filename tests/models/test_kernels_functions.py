"""Fused functions against formulas in fp64: the PyTorch twins here, Triton's programs in its interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels
from models.kernels.launching import WIDEST
from tests.interpreting import interpreted, needs_triton
from tests.models.building import randn
from tests.models.kernel_cases import CASES, HEAD_CASES, check, inputs, results, rounding

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Several tiles of rows for each of the three programs that add, the last one partly empty; heads and rows apart in
# memory; several tiles of columns; nothing at all.
SHAPES = [((210, 37), FP32, False), ((3, 5, 64), BF16, True), ((3, 1300), FP16, True), ((0, 16), BF16, False)]
HEAD_SHAPES = [((3, 70, 2, 6), FP32, False), ((2, 5, 3, 64), BF16, True), ((2, 9, 1, 12), FP16, True)]
HEAD_SHAPES += [((0, 4, 2, 8), BF16, False)]
GRID = [(name, *rest) for name in CASES for rest in SHAPES] + [
    (name, *rest) for name in HEAD_CASES for rest in HEAD_SHAPES
]
CORNERS = [(name, shape, dtype, True) for name in CASES for shape in ((1, 1), (130, 37)) for dtype in (BF16, FP16)]


@pytest.mark.parametrize(("name", "shape", "dtype", "strided"), GRID)
def test_twin(name: str, shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> None:
    check(name, shape, dtype, strided)


@needs_triton
@pytest.mark.parametrize("name", [*CASES, *HEAD_CASES])
def test_kernel(name: str) -> None:
    for shape, dtype, strided in HEAD_SHAPES if name in HEAD_CASES else SHAPES:
        interpreted(check, name, shape, dtype, strided)


@needs_triton
@pytest.mark.survey
@pytest.mark.parametrize(("name", "shape", "dtype", "strided"), CORNERS)
def test_kernel_at_further_corners(name: str, shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> None:
    interpreted(check, name, shape, dtype, strided)


@pytest.mark.parametrize("name", [*CASES, *HEAD_CASES])
def test_gradcheck(name: str) -> None:
    case = (CASES | HEAD_CASES)[name]
    given = inputs(case, (2, 3, 2, 4) if name in HEAD_CASES else (2, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(case.ours, given)


def check_saturated(function: str, farthest: float) -> None:
    """Every single derivative to 1e-5 of itself, far beyond where a rounded tanh or erf is 1, up to the smallest normal
    number; what comes close to 0 keeps its digits, too."""
    z = torch.cat([torch.linspace(-farthest, farthest, 400), torch.logspace(-20, 0, 100)]).reshape(10, 50)
    x = z.clone().requires_grad_()
    y = kernels.dyt(x, 1.0, function=function)
    y.sum().backward()  # a gradient of ones that is one number in memory
    exact = z.double().requires_grad_()
    expected = torch.tanh(exact) if function == "tanh" else torch.erf(exact)
    slope = 1 / torch.cosh(z.double()) ** 2 if function == "tanh" else 2 / torch.pi**0.5 * torch.exp(-(z.double() ** 2))
    torch.testing.assert_close(y.detach().double(), expected.detach(), rtol=4e-7, atol=0)
    assert x.grad is not None
    assert x.grad.min() > 0
    # exp of an argument of that size, which itself is rounded
    torch.testing.assert_close(x.grad.double(), slope, rtol=2 * 87 * 2.0**-23, atol=0)


def check_infinite(function: str) -> None:
    x = torch.tensor([[-torch.inf, -1e30, 1e30, torch.inf]], requires_grad=True)
    y = kernels.dyt(x, 1.0, function=function)
    y.sum().backward()
    assert y.tolist() == [[-1, -1, 1, 1]]
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0, 0, 0]]


@needs_triton
@pytest.mark.parametrize(("function", "farthest"), [("tanh", 40.0), ("erf", 9.0)])
def test_saturation(function: str, farthest: float) -> None:
    check_saturated(function, farthest)
    check_infinite(function)
    interpreted(check_saturated, function, farthest)
    interpreted(check_infinite, function)


def check_cross_entropy(dtype: torch.dtype, vocabulary: int, z_loss: float) -> None:
    logits = (5 * randn(5, vocabulary + 3)).to(dtype)[:, :vocabulary]  # rows at a distance
    logits[4] *= 40  # exponentials that overflow
    targets = torch.tensor([0, vocabulary - 1, kernels.IGNORE, vocabulary // 2, 1])
    exact = logits.double().requires_grad_()
    valid = targets != kernels.IGNORE
    nll = F.cross_entropy(exact, targets, ignore_index=kernels.IGNORE, reduction="none")
    squares = torch.logsumexp(exact, 1).square() * valid
    (nll + z_loss * squares).sum().backward()
    got = kernels.cross_entropy_(logits, targets, z_loss, True)
    torch.testing.assert_close(got, (nll.detach().float(), squares.detach().float()), rtol=2e-6, atol=2e-6)
    assert exact.grad is not None
    torch.testing.assert_close(logits.double(), exact.grad, rtol=rounding(dtype) + 3e-6, atol=1e-6)
    assert not logits[2].any()
    again = torch.randn_like(logits)
    wanted = kernels.cross_entropy_(again.clone(), targets, z_loss, True)
    assert all(map(torch.equal, kernels.cross_entropy_(again, targets, z_loss, False), wanted))
    assert [len(part) for part in kernels.cross_entropy_(logits[:0], targets[:0], z_loss, True)] == [0, 0]


@needs_triton
@pytest.mark.parametrize(("dtype", "vocabulary", "z_loss"), [(FP32, 61, 0.1), (BF16, 5000, 1e-4), (FP16, 17, 0.0)])
def test_cross_entropy(dtype: torch.dtype, vocabulary: int, z_loss: float) -> None:
    check_cross_entropy(dtype, vocabulary, z_loss)
    interpreted(check_cross_entropy, dtype, vocabulary, z_loss)


def twice(name: str) -> tuple[list[Tensor], list[Tensor]]:
    case = (CASES | HEAD_CASES)[name]
    given = inputs(case, (3, 70, 2, 6) if name in HEAD_CASES else (210, 37), BF16)
    first, second = ([t for part in results(case.ours, given) for t in part] for _ in range(2))
    return first, second


@needs_triton
@pytest.mark.parametrize("name", ["add-derf", "rms-add-rms", "rms-rotate"])
def test_the_same_bits_every_time(name: str) -> None:
    assert all(map(torch.equal, *interpreted(twice, name)))


@pytest.mark.parametrize("name", ["add-derf", "dyt", "rms", "rms-add", "rms-add-rms", "rms-rotate", "rotate", "swiglu"])
def test_operators_keep_their_word(name: str) -> None:
    """Schema, fake, autograd and tracing of each, and of its backward, by torch's own examination."""
    case = (CASES | HEAD_CASES)[name]
    given = inputs(case, (2, 3, 2, 4) if name in HEAD_CASES else (2, 3, 5), FP32)
    calls: list[tuple[torch._ops.OpOverload, tuple[object, ...]]] = []

    class Listener(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "equipoise":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Listener():
        results(case.ours, given)
    assert len(calls) >= 2
    for operator, args in calls:
        forward = not operator.name().endswith("_backward")
        fresh = [
            a.detach().clone().requires_grad_(forward and a.requires_grad) if isinstance(a, Tensor) else a for a in args
        ]
        torch.library.opcheck(operator, tuple(fresh))


def test_the_operator_that_overwrites_keeps_its_word() -> None:
    targets = torch.tensor([1, kernels.IGNORE, 4])
    torch.library.opcheck(torch.ops.equipoise.cross_entropy_.default, (randn(3, 5), targets, 0.1, True))


@needs_triton
def test_rows_too_wide_for_a_program_go_to_the_twin() -> None:
    interpreted(check, "rms-add-rms", (1, WIDEST + 2), BF16)
