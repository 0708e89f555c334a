"""Every fused function beside its formula in fp64, and the comparison of the two, gradients included.

The reference is autograd's, of formulas that share no line with the kernels or their twins. Where a kernel stores the
stream and goes on from what it stored, the formula goes on from there too: what remains is one rounding a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels
from models.rotary import rotary_table, rotate
from tests.models.building import randn

EPS, BRANCH_EPS = 1e-3, 1e-2  # large enough to be seen
NOISE = 4e-6  # of fp32 arithmetic, in units of the largest element: sums of some hundred terms, exponentials

Function = Callable[..., Any]


class Case(NamedTuple):
    """``ours`` of tensors named in ``takes``: x and b are data [..., width], g, h, B vectors [width], a, s scalars [1].

    ``theirs`` gets the same in fp64 and, at last, a function that the stream goes through on its way to storage.
    """

    takes: str
    ours: Function
    theirs: Function


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one, for numbers that are not tiny. The interpreter cuts bf16 off."""
    return torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 and kernels.is_interpreted() else 2)


def rms(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], gain, eps)


def _both(s: Tensor, stored: Function, f: Function) -> tuple[Tensor, Tensor]:
    return s, f(stored(s))


CASES = {
    "dyt": Case("xag", lambda x, a, g: kernels.dyt(x, a, g), lambda x, a, g, _: g * torch.tanh(a * x)),
    "dyt-bare": Case("x", lambda x: kernels.dyt(x, 0.8), lambda x, _: torch.tanh(0.8 * x)),
    "dyt-all": Case(
        "xagBs",
        lambda x, a, g, beta, s: kernels.dyt(x, a, g, beta, s),
        lambda x, a, g, beta, s, _: g * torch.tanh(a * x + s) + beta,
    ),
    "dyt-fixed": Case(
        "xBs",
        lambda x, beta, s: kernels.dyt(x, 0.8, None, beta, s),
        lambda x, beta, s, _: torch.tanh(0.8 * x + s) + beta,
    ),
    "derf": Case(
        "xagBs",
        lambda x, a, g, beta, s: kernels.dyt(x, a, g, beta, s, "erf"),
        lambda x, a, g, beta, s, _: g * torch.erf(a * x + s) + beta,
    ),
    "add-dyt": Case(
        "xbag",
        lambda x, b, a, g: kernels.add_dyt(x, b, a, g),
        lambda x, b, a, g, stored: _both(x + b, stored, lambda v: g * torch.tanh(a * v)),
    ),
    "add-derf": Case(
        "xbagBs",
        lambda x, b, a, g, beta, s: kernels.add_dyt(x, b, a, g, beta, s, "erf"),
        lambda x, b, a, g, beta, s, stored: _both(x + b, stored, lambda v: g * torch.erf(a * v + s) + beta),
    ),
    "rms": Case("xg", lambda x, g: kernels.rms_norm(x, g, EPS), lambda x, g, _: rms(x, g, EPS)),
    "rms-bare": Case("x", lambda x: kernels.rms_norm(x, None, EPS), lambda x, _: rms(x, None, EPS)),
    "rms-add": Case("xbg", lambda x, b, g: kernels.rms_norm_add(x, b, g, EPS), lambda x, b, g, _: x + rms(b, g, EPS)),
    "add-rms": Case(
        "xbg",
        lambda x, b, g: kernels.add_rms_norm(x, b, g, EPS),
        lambda x, b, g, stored: _both(x + b, stored, lambda v: rms(v, g, EPS)),
    ),
    "rms-add-rms": Case(
        "xbhg",
        lambda x, b, h, g: kernels.rms_norm_add_rms_norm(x, b, h, BRANCH_EPS, g, EPS),
        lambda x, b, h, g, stored: _both(x + rms(b, h, BRANCH_EPS), stored, lambda v: rms(v, g, EPS)),
    ),
    "rms-add-rms-bare": Case(
        "xb",
        lambda x, b: kernels.rms_norm_add_rms_norm(x, b, None, BRANCH_EPS, None, EPS),
        lambda x, b, stored: _both(x + rms(b, None, BRANCH_EPS), stored, lambda v: rms(v, None, EPS)),
    ),
    "swiglu": Case("xb", kernels.silu_mul, lambda gate, up, _: gate / (1 + torch.exp(-gate)) * up),
}


def _rotated(x: Tensor) -> Tensor:
    """RoPE of models/rotary.py, which takes heads before positions."""
    cosine, sine = (part.to(x.dtype) for part in table_of(x))
    return rotate(x.transpose(1, 2), (cosine, sine)).transpose(1, 2)


def table_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """For x [batch, length, heads, head width]."""
    return rotary_table(x.shape[1], x.shape[-1], 100.0, x.device)


HEAD_CASES = {
    "rotate": Case("x", lambda x: kernels.rotate(x, *table_of(x)), lambda x, _: _rotated(x)),
    "rms-rotate": Case(
        "xg",
        lambda x, g: kernels.rms_norm_rotate(x, *table_of(x), g, EPS),
        lambda x, g, _: _rotated(rms(x, g, EPS)),
    ),
    "rms-rotate-bare": Case(
        "x",
        lambda x: kernels.rms_norm_rotate(x, *table_of(x), None, EPS),
        lambda x, _: _rotated(rms(x, None, EPS)),
    ),
}


def inputs(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype, strided: bool = False, scale: float = 1.0
) -> list[Tensor]:
    """Data in ``dtype``, parameters in fp32, or all in fp64. ``strided``: rows at a distance, and for three axes and
    more the first two exchanged in memory."""
    made = []
    for seed, name in enumerate(case.takes):
        if name in "xb":
            x = (scale * randn(*shape[:-1], shape[-1] + 3 * strided, seed=seed)).to(dtype)[..., : shape[-1]]
            made.append(x.transpose(0, 1).contiguous().transpose(0, 1) if strided and seed and len(shape) > 2 else x)
        else:
            size = 1 if name in "as" else shape[-1]
            made.append((0.7 + 0.2 * randn(size, seed=seed)).to(torch.promote_types(dtype, torch.float32)))
    return [tensor.detach().requires_grad_() for tensor in made]


def results(f: Function, given: list[Tensor], seeds: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """What f returns, and the gradients of all inputs when those of the outputs are ``seeds``, here drawn if None."""
    y = f(*given)
    outputs = list(y) if isinstance(y, tuple) else [y]
    if seeds is None:
        seeds = [randn(*one.shape, seed=50 + i).to(one.dtype) for i, one in enumerate(outputs)]
    return [one.detach() for one in outputs], list(torch.autograd.grad(outputs, given, seeds))


def check(name: str, shape: tuple[int, ...], dtype: torch.dtype, strided: bool = False, scale: float = 1.0) -> None:
    """Every result to one rounding of its dtype; what passes the norm of a branch, whose incoming gradient was rounded
    already, to one of its largest element. The gradients of parameters are fp32's whatever the data are."""
    case = (CASES | HEAD_CASES)[name]
    given = inputs(case, shape, dtype, strided, scale)
    outputs, gradients = results(case.ours, given)
    seeds = [randn(*one.shape, seed=50 + i).to(dtype).double() for i, one in enumerate(outputs)]

    def stored(s: Tensor) -> Tensor:
        return s + (outputs[0].double() - s).detach()

    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected, expected_gradients = results(lambda *tensors: case.theirs(*tensors, stored), exact, seeds)
    kinds = ["output"] * len(outputs) + list(case.takes)
    for kind, got, wanted in zip(kinds, [*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        data, twice = kind in ("output", "x", "b"), name.startswith("rms-add-rms") and kind in ("b", "h")
        assert got.dtype == (dtype if data else torch.float32), (name, kind)
        assert got.shape == wanted.shape, (name, kind)
        size = max(wanted.abs().max().item(), 0.1) if wanted.numel() else 0.0
        terms = given[0].numel() / max(1, got.numel())  # of order 1 and either sign: their sum may be far smaller
        torch.testing.assert_close(
            got.double(),
            wanted,
            rtol=(rounding(dtype) if data else 0.0) + NOISE,
            atol=(NOISE + twice * rounding(dtype)) * size + 1e-8 * terms,
            msg=lambda text, kind=kind: f"{name} {kind}: {text}",
        )
