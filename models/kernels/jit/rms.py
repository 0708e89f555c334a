"""RMSNorm, of a branch before it joins the stream, of the stream after that, or of both."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normalized(v: tl.tensor, gain: tl.tensor, eps: tl.tensor, column: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Of rows whose places beyond the width hold 0."""
    v *= tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / width + eps)
    return v if gain is None else v * tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def forward(
    x: tl.tensor,
    branch: tl.tensor,
    stream: tl.tensor,
    y: tl.tensor,
    branch_gain: tl.tensor,
    gain: tl.tensor,
    branch_eps: tl.tensor,
    eps: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    branch_stride: tl.tensor,
    NORM_BRANCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """``stream = x + branch``, or ``x + rms(branch)``; ``y = rms(stream)``, or of x without a branch; y may be None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    place = row * width + column
    v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + row * branch_stride + column, mask=inside, other=0.0).to(tl.float32)
        v += _normalized(added, branch_gain, branch_eps, column, width) if NORM_BRANCH else added
        low = v.to(stream.dtype.element_ty)
        tl.store(stream + place, low, mask=inside)
        v = low.to(tl.float32)  # the backward sees the stream as it was stored
    if y is not None:
        tl.store(y + place, _normalized(v, gain, eps, column, width), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def backward(
    grad: tl.tensor,
    x: tl.tensor,
    grad_stream: tl.tensor,
    grad_x: tl.tensor,
    gain_parts: tl.tensor,
    gain: tl.tensor,
    eps: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
    x_stride: tl.tensor,
    grad_stream_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """With r = 1/rms, n = r x and g = grad * gain: ``grad_x = r (g - n mean(g n)) + grad_stream``, and this program's
    part of the sum over rows of grad * n."""
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    scale = tl.full((1, COLUMNS), 1.0, tl.float32)
    if gain is not None:
        scale = tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, rows, tl.num_programs(0) * ROWS):
        row = begin + first
        inside = (row < rows) & (column < width)
        v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / width + eps)
        n = v * r
        g = dy * scale
        dx = r * (g - n * (tl.sum(g * n, axis=1, keep_dims=True) / width))
        if gain_parts is not None:
            total += dy * n
        if grad_stream is not None:
            dx += tl.load(grad_stream + row * grad_stream_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * width + column, dx, mask=inside)
    if gain_parts is not None:
        columns = tl.arange(0, COLUMNS)
        tl.store(gain_parts + tl.program_id(0) * width + columns, tl.sum(total, axis=0), mask=columns < width)
