"""DyT (arXiv 2503.10622) and Derf (arXiv 2512.10938), alone and behind the addition of a branch to the stream.

With z = alpha * x + shift and y = gain * f(z) + beta, and g = dy * gain * f'(z)::

    dx = alpha * g,  dalpha = sum(x * g),  dshift = sum(g),  dgain = rows' sum(dy * f(z)),  dbeta = rows' sum(dy)

z and f are computed again from x, in fp32: nothing but x is kept, and 1 - tanh^2 never comes from a rounded tanh.

y is stored in the dtype of x, or for a linear that reads 8 bits as e4m3 (arXiv 2209.05433), multiplied by a scale that
is known before: of bf16 that moves 3 bytes an element, where a rounding in a pass of its own makes it 7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels.launching import adders, empty_sum, is_interpreted, kernel, rows_of, runs_triton, tile, tiled
from models.precision import wide

_ELEMENTS = 4096  # forward: of a program
_ADDED = 2048  # backward: with up to four sums at hand beside them
_COLUMNS = 1024  # of a row, at most: 2 KB in bf16
_E4M3 = torch.float8_e4m3fn


def dyt_twin(
    x: Tensor,
    alpha: Tensor | float,
    gain: Tensor | None,
    beta: Tensor | None,
    shift: Tensor | None,
    function: str,
    scale: Tensor | None = None,
) -> Tensor:
    """``gain * f(alpha * x + shift) + beta`` in fp32, in the dtype of x; times a scale in e4m3, saturated (PyTorch's
    conversion gives NaN beyond 448 in some versions)."""
    z = _argument(x, alpha, shift)
    y = torch.tanh(z) if function == "tanh" else torch.erf(z)
    y = y if gain is None else gain * y
    y = y if beta is None else y + beta
    return y.to(x.dtype) if scale is None else (y * scale).clamp(-448, 448).to(_E4M3)


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
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x + branch, or x itself without one; y, with a scale in e4m3)."""
    flat, other = rows_of(x), None if branch is None else rows_of(branch)
    stream = x if branch is None else empty_sum(x, branch)
    # Triton's interpreter loses the carry where it rounds a significand up to e4m3 (31.6 becomes 16). There the kernel
    # stores in fp32 what it would round, and PyTorch rounds.
    dtype = stream.dtype if scale is None else torch.float32 if is_interpreted() else _E4M3
    y = stream.new_empty(x.shape, dtype=dtype)
    rows, width = flat.shape
    grid, settings = tiled(rows, width, _ELEMENTS, _COLUMNS)
    kernel("dyt", "forward")[grid](
        flat, other, None if branch is None else stream, y, alpha, gain, beta, shift, scale, fixed, rows, width,
        flat.stride(0), 0 if other is None else other.stride(0),
        FUNCTION=function, **settings,
    )  # fmt: skip
    return stream, y if scale is None else y.to(_E4M3)


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


@torch.library.custom_op("equipoise::dyt_e4m3", mutates_args=())
def _dyt_e4m3(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor,
    alpha: Tensor | None,
    gain: Tensor | None,
    beta: Tensor | None,
    shift: Tensor | None,
    fixed: float,
    function: str,
) -> list[Tensor]:
    """x + branch, if there is one, and y: without autograd, whose gradients have the dtype of what they are of."""
    if runs_triton(x):
        stream, y = _launch(x, branch, alpha, gain, beta, shift, fixed, function, scale)
    else:
        stream = x if branch is None else (x + branch).contiguous()
        y = dyt_twin(stream, fixed if alpha is None else alpha, gain, beta, shift, function, scale).contiguous()
    return [y] if branch is None else [stream, y]


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


@_dyt_e4m3.register_fake
def _(x: Tensor, branch: Tensor | None, *settings: Any) -> list[Tensor]:
    y = x.new_empty(x.shape, dtype=_E4M3)
    return [y] if branch is None else [empty_sum(x, branch), y]


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
    *tensors, ctx.fixed, ctx.function = settings
    ctx.save_for_backward(x, *tensors)


def _gradients(ctx: Any, grad: Tensor, grad_stream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x and of the settings."""
    x, learned, gain, beta, shift = ctx.saved_tensors
    alpha = ctx.fixed if learned is None else learned
    return *dyt_gradients(grad, x, grad_stream, alpha, gain, beta, shift, ctx.function), None, None


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


def dyt_e4m3(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor,
    alpha: Tensor | float,
    gain: Tensor | None = None,
    beta: Tensor | None = None,
    shift: Tensor | None = None,
    function: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """What ``add_dyt`` returns, or without a branch ``(x, dyt(x))``, the second in float8_e4m3fn: multiplied by
    ``scale`` (fp32, one number) and rounded once, from fp32; what exceeds 448 is 448.

    Autograd does not go through it: the gradient of 8 bits would have 8 bits. Its derivative, with that of the rounding
    taken as 1, is ``dyt_gradients``.
    """
    learned, fixed = _learned_or_fixed(alpha)
    written = _dyt_e4m3(x, branch, scale, learned, gain, beta, shift, fixed, function)
    return x if branch is None else written[0], written[-1]


def dyt_gradients(
    grad: Tensor,
    stream: Tensor,
    grad_stream: Tensor | None,
    alpha: Tensor | float,
    gain: Tensor | None,
    beta: Tensor | None,
    shift: Tensor | None,
    function: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``stream``, what dyt was of, and of alpha, gain, beta and shift, where these are tensors. They come
    from ``grad``, of dyt's result, and for the stream also from ``grad_stream``, of its other uses."""
    learned, fixed = _learned_or_fixed(alpha)
    dx, vectors, scalars = _backward(grad, stream, grad_stream, learned, gain, shift, fixed, beta is not None, function)
    return (
        dx,
        None if learned is None else scalars[:1].to(learned.dtype),
        None if gain is None else vectors[0].to(gain.dtype),
        None if beta is None else vectors[-1].to(beta.dtype),
        None if shift is None else scalars[-1:].to(shift.dtype),
    )
