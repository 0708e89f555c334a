"""DyT and Derf, behind an addition or not: one pass forward, one pass backward."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(z: tl.tensor) -> tl.tensor:
    """To 1e-6 of itself, with one exponential; below 1/4, where 1 - e loses digits, its series to z^9."""
    e = tl.exp(-2 * tl.abs(z))
    t = (1 - e) / (1 + e)
    q = z * z
    series = z * (1 + q * (-0.3333333333 + q * (0.1333333333 + q * (-0.0539682540 + q * 0.0218694885))))
    return tl.where(tl.abs(z) < 0.25, series, tl.where(z < 0, -t, t))


@triton.jit
def _value(z: tl.tensor, FUNCTION: tl.constexpr) -> tl.tensor:
    return _tanh(z) if FUNCTION == "tanh" else tl.erf(z)


@triton.jit
def _slope(z: tl.tensor, FUNCTION: tl.constexpr) -> tl.tensor:
    """1 - tanh^2 as 4 e / (1 + e)^2, which keeps its digits where tanh is 1; or 2 / sqrt(pi) exp(-z^2)."""
    if FUNCTION == "tanh":
        e = tl.exp(-2 * tl.abs(z))
        slope = 4 * e / ((1 + e) * (1 + e))
    else:
        slope = 1.1283791670955126 * tl.exp(-z * z)
    return slope


@triton.jit
def _argument(x: tl.tensor, alpha: tl.tensor, fixed: tl.tensor, shift: tl.tensor, FUNCTION: tl.constexpr) -> tl.tensor:
    z = x * (fixed if alpha is None else tl.load(alpha))
    return z if shift is None else z + tl.load(shift)


@triton.jit(do_not_specialize=["rows"])
def forward(
    x: tl.tensor,
    branch: tl.tensor,
    stream: tl.tensor,
    y: tl.tensor,
    alpha: tl.tensor,
    gain: tl.tensor,
    beta: tl.tensor,
    shift: tl.tensor,
    scale: tl.tensor,
    fixed: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    branch_stride: tl.tensor,
    FUNCTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """``y = gain * f(alpha * x + shift) + beta``; with a branch of x + branch, which goes to ``stream``; with a scale
    times this, within what e4m3 has."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    place = row * width + column
    v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        v += tl.load(branch + row * branch_stride + column, mask=inside, other=0.0).to(tl.float32)
        low = v.to(stream.dtype.element_ty)
        tl.store(stream + place, low, mask=inside)
        v = low.to(tl.float32)  # the backward sees the stream as it was stored
    v = _value(_argument(v, alpha, fixed, shift, FUNCTION), FUNCTION)
    if gain is not None:
        v *= tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)
    if beta is not None:
        v += tl.load(beta + column, mask=column < width, other=0.0).to(tl.float32)
    if scale is not None:
        v = tl.clamp(v * tl.load(scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + place, v, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def backward(
    grad: tl.tensor,
    x: tl.tensor,
    grad_stream: tl.tensor,
    grad_x: tl.tensor,
    gain_parts: tl.tensor,
    beta_parts: tl.tensor,
    alpha_parts: tl.tensor,
    shift_parts: tl.tensor,
    alpha: tl.tensor,
    gain: tl.tensor,
    shift: tl.tensor,
    fixed: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
    x_stride: tl.tensor,
    grad_stream_stride: tl.tensor,
    FUNCTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """With g = grad * gain * f'(z): ``grad_x = alpha * g + grad_stream``, and this program's parts of the sums: of
    grad * f(z) and of grad over its rows, and of x * g and of g, which are those of alpha and shift.

    What is added stays apart for each place of the tile until the last row: no reduction between threads on the way.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    a = fixed if alpha is None else tl.load(alpha)
    scale = tl.full((1, COLUMNS), 1.0, tl.float32)
    if gain is not None:
        scale = tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)
    gain_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    beta_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    alpha_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    shift_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, rows, tl.num_programs(0) * ROWS):
        row = begin + first
        inside = (row < rows) & (column < width)
        v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        z = _argument(v, alpha, fixed, shift, FUNCTION)
        g = dy * scale * _slope(z, FUNCTION)
        if gain_parts is not None:
            gain_sum += dy * _value(z, FUNCTION)
        if beta_parts is not None:
            beta_sum += dy
        if alpha_parts is not None:
            alpha_sum += v * g
        if shift_parts is not None:
            shift_sum += g
        dx = a * g
        if grad_stream is not None:
            dx += tl.load(grad_stream + row * grad_stream_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * width + column, dx, mask=inside)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(0) * width + columns
    if gain_parts is not None:
        tl.store(gain_parts + part, tl.sum(gain_sum, axis=0), mask=columns < width)
    if beta_parts is not None:
        tl.store(beta_parts + part, tl.sum(beta_sum, axis=0), mask=columns < width)
    own = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if alpha_parts is not None:
        tl.store(alpha_parts + own, tl.sum(tl.sum(alpha_sum, axis=1), axis=0))
    if shift_parts is not None:
        tl.store(shift_parts + own, tl.sum(tl.sum(shift_sum, axis=1), axis=0))
