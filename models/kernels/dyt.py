"""DyT (arXiv 2503.10622) and Derf (arXiv 2512.10938), alone and behind the addition of a branch to the stream.

With z = alpha * x + shift and y = gain * f(z) + beta, and g = dy * gain * f'(z)::

    dx = alpha * g,  dalpha = sum(x * g),  dshift = sum(g),  dgain = rows' sum(dy * f(z)),  dbeta = rows' sum(dy)

z and f are computed again from x, in fp32: nothing but x is kept, and 1 - tanh^2 never comes from a rounded tanh.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels.launching import adders, empty_sum, kernel, rows_of, runs_triton, tile, warps
from models.precision import wide

_ELEMENTS = 4096  # forward: of a program
_ADDED = 2048  # backward: with up to four sums at hand beside them
_COLUMNS = 1024  # of a row, at most: 2 KB in bf16


def dyt_twin(
    x: Tensor, alpha: Tensor | float, gain: Tensor | None, beta: Tensor | None, shift: Tensor | None, function: str
) -> Tensor:
    """``gain * f(alpha * x + shift) + beta`` in fp32, in the dtype of x."""
    z = _argument(x, alpha, shift)
    y = torch.tanh(z) if function == "tanh" else torch.erf(z)
    y = y if gain is None else gain * y
    return (y if beta is None else y + beta).to(x.dtype)


def dyt_backward_twin(
    grad: Tensor,
    x: Tensor,
    grad_stream: Tensor | None,
    alpha: Tensor | float,
    gain: Tensor | None,
    shift: Tensor | None,
    beta: bool,
    function: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_backward`` returns."""
    z = _argument(x, alpha, shift)
    dy = wide(grad)
    if function == "tanh":
        e = torch.exp(-2 * z.abs())
        value, slope = torch.tanh(z), 4 * e / (1 + e).square()
    else:
        value, slope = torch.erf(z), 2 / torch.pi**0.5 * torch.exp(-z * z)
    g = dy * slope if gain is None else dy * gain * slope
    dx = alpha * g
    dx = dx if grad_stream is None else dx + wide(grad_stream)
    over_rows = tuple(range(x.dim() - 1))
    vectors = [] if gain is None else [(dy * value).sum(over_rows)]
    vectors += [dy.sum(over_rows)] if beta else []
    scalars = [(wide(x) * g).sum()] if isinstance(alpha, Tensor) else []
    scalars += [] if shift is None else [g.sum()]
    return (
        dx.to(x.dtype),
        torch.stack(vectors) if vectors else dy.new_empty(0, x.shape[-1]),
        torch.stack(scalars) if scalars else dy.new_empty(0),
    )


def _argument(x: Tensor, alpha: Tensor | float, shift: Tensor | None) -> Tensor:
    z = alpha * wide(x)
    return z if shift is None else z + shift


def _launch(
    x: Tensor,
    branch: Tensor | None,
    alpha: Tensor | None,
    gain: Tensor | None,
    beta: Tensor | None,
    shift: Tensor | None,
    fixed: float,
    function: str,
) -> tuple[Tensor, Tensor]:
    """(x + branch, or x itself without one; y)."""
    flat, other = rows_of(x), None if branch is None else rows_of(branch)
    stream = x if branch is None else empty_sum(x, branch)
    y = stream.new_empty(x.shape)
    rows, width = flat.shape
    block = tile(width, _ELEMENTS, _COLUMNS)
    grid = (-(-rows // block[0]), -(-width // block[1]))
    kernel("dyt", "forward")[grid](
        flat, other, None if branch is None else stream, y, alpha, gain, beta, shift, fixed, rows, width,
        flat.stride(0), 0 if other is None else other.stride(0),
        FUNCTION=function, ROWS=block[0], COLUMNS=block[1], num_warps=warps(block[0] * block[1]),
    )  # fmt: skip
    return stream, y


@torch.library.custom_op("equipoise::dyt", mutates_args=())
def _dyt(
    x: Tensor,
    alpha: Tensor | None,
    gain: Tensor | None,
    beta: Tensor | None,
    shift: Tensor | None,
    fixed: float,
    function: str,
) -> Tensor:
    if runs_triton(x):
        return _launch(x, None, alpha, gain, beta, shift, fixed, function)[1]
    return dyt_twin(x, fixed if alpha is None else alpha, gain, beta, shift, function).contiguous()


@torch.library.custom_op("equipoise::add_dyt", mutates_args=())
def _add_dyt(
    x: Tensor,
    branch: Tensor,
    alpha: Tensor | None,
    gain: Tensor | None,
    beta: Tensor | None,
    shift: Tensor | None,
    fixed: float,
    function: str,
) -> tuple[Tensor, Tensor]:
    if runs_triton(x):
        return _launch(x, branch, alpha, gain, beta, shift, fixed, function)
    stream = (x + branch).contiguous()
    return stream, dyt_twin(stream, fixed if alpha is None else alpha, gain, beta, shift, function)


@torch.library.custom_op("equipoise::dyt_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    grad_stream: Tensor | None,
    alpha: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    fixed: float,
    beta: bool,
    function: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, with ``grad_stream`` added; of gain and beta, where there are any, fp32 [0 to 2, width]; of alpha, if it is
    not fixed, and shift, fp32 [0 to 2]."""
    if not runs_triton(x):
        dx, vectors, scalars = dyt_backward_twin(
            grad, x, grad_stream, fixed if alpha is None else alpha, gain, shift, beta, function
        )
        return dx.contiguous(), vectors, scalars
    dy, flat, more = rows_of(grad), rows_of(x), None if grad_stream is None else rows_of(grad_stream)
    rows, width = flat.shape
    block = tile(width, _ADDED, _COLUMNS // 2)
    across = -(-width // block[1])
    programs = adders(x, -(-rows // block[0]), 4, across)
    dx = x.new_empty(x.shape)
    vectors = x.new_empty((gain is not None) + beta, programs, width, dtype=torch.float32)
    scalars = x.new_empty((alpha is not None) + (shift is not None), programs * across, dtype=torch.float32)
    kernel("dyt", "backward")[(programs, across)](
        dy, flat, more, dx,
        None if gain is None else vectors[0], vectors[-1] if beta else None,
        None if alpha is None else scalars[0], None if shift is None else scalars[-1],
        alpha, gain, shift, fixed, rows, width,
        dy.stride(0), flat.stride(0), 0 if more is None else more.stride(0),
        FUNCTION=function, ROWS=block[0], COLUMNS=block[1], num_warps=4,
    )  # fmt: skip
    return dx, vectors.sum(1), scalars.sum(1)


@_dyt.register_fake
def _(x: Tensor, *settings: Any) -> Tensor:
    return x.new_empty(x.shape)


@_add_dyt.register_fake
def _(x: Tensor, branch: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return empty_sum(x, branch), empty_sum(x, branch)


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    grad_stream: Tensor | None,
    alpha: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    fixed: float,
    beta: bool,
    function: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    vectors = x.new_empty((gain is not None) + beta, x.shape[-1], dtype=dtype)
    return x.new_empty(x.shape), vectors, x.new_empty((alpha is not None) + (shift is not None), dtype=dtype)


def _keep(ctx: Any, x: Tensor, settings: tuple[Any, ...]) -> None:
    alpha, gain, beta, shift, ctx.fixed, ctx.function = settings
    ctx.beta = None if beta is None else beta.dtype
    ctx.save_for_backward(x, alpha, gain, shift)


def _gradients(ctx: Any, grad: Tensor, grad_stream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x and of the settings."""
    x, alpha, gain, shift = ctx.saved_tensors
    dx, vectors, scalars = _backward(
        grad, x, grad_stream, alpha, gain, shift, ctx.fixed, ctx.beta is not None, ctx.function
    )
    return (
        dx,
        None if alpha is None else scalars[:1].to(alpha.dtype),
        None if gain is None else vectors[0].to(gain.dtype),
        None if ctx.beta is None else vectors[-1].to(ctx.beta),
        None if shift is None else scalars[-1:].to(shift.dtype),
        None,
        None,
    )


def _keep_dyt(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep(ctx, inputs[0], inputs[1:])


def _dyt_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad, None)


def _keep_add_dyt(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, *settings = inputs
    ctx.dtypes = x.dtype, branch.dtype
    _keep(ctx, output[0], tuple(settings))


def _add_dyt_gradients(ctx: Any, grad_stream: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, *others = _gradients(ctx, grad, grad_stream)
    assert dx is not None
    return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), *others


_dyt.register_autograd(_dyt_gradients, setup_context=_keep_dyt)
_add_dyt.register_autograd(_add_dyt_gradients, setup_context=_keep_add_dyt)


def _learned_or_fixed(alpha: Tensor | float) -> tuple[Tensor | None, float]:
    """As operators take it: a tensor, or a number of the kernel's arguments, which needs no tensor on the device."""
    return (alpha, 0.0) if isinstance(alpha, Tensor) else (None, float(alpha))


def dyt(
    x: Tensor,
    alpha: Tensor | float,
    gain: Tensor | None = None,
    beta: Tensor | None = None,
    shift: Tensor | None = None,
    function: str = "tanh",
) -> Tensor:
    """``gain * f(alpha * x + shift) + beta`` of ``x`` [..., width], in its dtype; f is ``function``: tanh, or erf.

    ``alpha`` and ``shift`` have shape (1,), a fixed alpha is a number; ``gain`` and ``beta`` have [width]. All of them
    fp32, and so are their gradients.
    """
    learned, fixed = _learned_or_fixed(alpha)
    return _dyt(x, learned, gain, beta, shift, fixed, function)


def add_dyt(
    x: Tensor,
    branch: Tensor,
    alpha: Tensor | float,
    gain: Tensor | None = None,
    beta: Tensor | None = None,
    shift: Tensor | None = None,
    function: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """``(x + branch, dyt(x + branch))``, of the sum as it is rounded; the rest as of ``dyt``."""
    learned, fixed = _learned_or_fixed(alpha)
    return _add_dyt(x, branch, learned, gain, beta, shift, fixed, function)
