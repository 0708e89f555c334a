"""DyT that writes e4m3: its rounding is the one of the formula in fp64, up to what fp32 computes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models import kernels
from tests.interpreting import interpreted, needs_triton
from tests.models.building import randn
from tests.models.kernel_cases import NOISE

E4M3 = torch.float8_e4m3fn
# Name: function, behind an addition, with alpha, gain, beta and shift learned or without all of them.
FORMS = {"dyt": ("tanh", False, True), "bare": ("tanh", True, False), "add-derf": ("erf", True, True)}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Several tiles of rows, the last one partly empty; rows at a distance; several tiles of columns; nothing at all.
SHAPES = [((210, 37), FP32), ((3, 5, 64), BF16), ((3, 1300), FP16), ((0, 16), FP32)]


def check(form: str) -> None:
    function, added, learned = FORMS[form]
    for shape, dtype in SHAPES:
        width = shape[-1]
        x, branch = ((3 * randn(*shape[:-1], width + 8, seed=i)).to(dtype)[..., :width] for i in (1, 2))
        alpha, shift = (torch.tensor([n]) if learned else None for n in (0.7, 0.2))
        gain, beta = (1 + 0.3 * randn(width, seed=3), 0.2 * randn(width, seed=4)) if learned else (None, None)
        bound = gain.abs().add(beta.abs()).amax() if gain is not None and beta is not None else torch.tensor(1.0)
        scale = 448 / bound
        settings: Any = (0.8 if alpha is None else alpha, gain, beta, shift, function)
        stream, y = kernels.dyt_e4m3(x, branch if added else None, scale, *settings)
        assert torch.equal(stream, kernels.add_dyt(x, branch, *settings)[0]) if added else stream is x
        assert (y.dtype, y.shape, y.is_contiguous()) == (E4M3, x.shape, True)
        z = stream.double() * (0.8 if alpha is None else alpha.double()) + (0 if shift is None else shift.double())
        exact = torch.tanh(z) if function == "tanh" else torch.erf(z)
        exact = exact if gain is None or beta is None else gain.double() * exact + beta.double()
        # Rounding is monotonous: what is within fp32's noise of the exact value comes out between its neighbours.
        low, high = ((exact * scale + sign * NOISE * 448).float().clamp(-448, 448).to(E4M3).float() for sign in (-1, 1))
        assert ((low <= y.float()) & (y.float() <= high)).all()
        assert (low == high).sum() >= 0.9 * y.numel(), "which mostly are one number"


@pytest.mark.parametrize("form", FORMS)
def test_twin(form: str) -> None:
    check(form)


@needs_triton
@pytest.mark.parametrize("form", FORMS)
def test_kernel(form: str) -> None:
    """All but the conversion, which is PyTorch's here: the interpreter's own is wrong. What a GPU stores is compiled in
    test_kernels_compiled.py."""
    interpreted(check, form)


def check_extremes() -> None:
    """A scale beyond the bound saturates; what is not a number stays none, so that a run sees it."""
    x = torch.tensor([[-torch.inf, -2.0, 0.0, 2.0, torch.inf, torch.nan]])
    y = kernels.dyt_e4m3(x, None, torch.tensor(1e6), 1.0)[1].float()
    assert y[0, :5].tolist() == [-448, -448, 0, 448, 448]
    assert y[0, 5].isnan()


@needs_triton
def test_extremes() -> None:
    check_extremes()
    interpreted(check_extremes)


def given(dtype: torch.dtype = FP32) -> list[Tensor]:
    x, branch = randn(2, 3, 5, seed=1).to(dtype), randn(2, 3, 5, seed=2).to(dtype)
    return [x, branch, torch.tensor([0.7]), randn(5, seed=3), randn(5, seed=4), torch.tensor([0.2])]


@pytest.mark.parametrize("added", [False, True])
def test_the_operator_keeps_its_word(added: bool) -> None:
    x, branch, *settings = given(BF16)
    args = (x, branch if added else None, torch.tensor(100.0), *settings, 0.0, "tanh")
    torch.library.opcheck(torch.ops.equipoise.dyt_e4m3.default, args)


def test_it_has_no_gradient_of_its_own() -> None:
    """Which autograd would give in 8 bits: it refuses, as it has to."""
    x = given()[0].requires_grad_()
    y = kernels.dyt_e4m3(x, None, torch.tensor(100.0), 0.8)[1]
    with pytest.raises(RuntimeError, match="dyt_e4m3"):
        y.backward(torch.ones_like(y))
