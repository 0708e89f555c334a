"""RoPE of heads, and RMSNorm of each before it. A row is one head of one token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(
    row: tl.tensor, length: tl.tensor, heads: tl.tensor, batch_stride: tl.tensor, token_stride: tl.tensor,
    head_stride: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Where the row begins in [batch, length, heads, head width] with these strides. Rows are counted in 32 bits, in
    which division is several times faster."""
    token = row // heads
    batch = (token // length).to(tl.int64)
    return batch * batch_stride + (token % length).to(tl.int64) * token_stride + row % heads * head_stride


@triton.jit(do_not_specialize=["rows", "length"])
def forward(
    x: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    y: tl.tensor,
    gain: tl.tensor,
    eps: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """``y = (x1 cos - x2 sin, x2 cos + x1 sin)`` for the halves x1, x2 of a head, normalized or as they are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    real = column < half
    inside = (row < rows) & real
    begin = x + _place(row, length, heads, batch_stride, token_stride, head_stride) + column
    v1 = tl.load(begin, mask=inside, other=0.0).to(tl.float32)
    v2 = tl.load(begin + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        r = tl.rsqrt(tl.sum(v1 * v1 + v2 * v2, axis=1, keep_dims=True) / (2 * half) + eps)
        v1 *= r
        v2 *= r
        if gain is not None:
            v1 *= tl.load(gain + column, mask=real, other=0.0).to(tl.float32)
            v2 *= tl.load(gain + half + column, mask=real, other=0.0).to(tl.float32)
    angle = (row // heads % length) * half + column
    c = tl.load(cosine + angle, mask=inside, other=0.0)
    s = tl.load(sine + angle, mask=inside, other=0.0)
    place = row.to(tl.int64) * (2 * half) + column
    tl.store(y + place, v1 * c - v2 * s, mask=inside)
    tl.store(y + place + half, v2 * c + v1 * s, mask=inside)


@triton.jit(do_not_specialize=["rows", "length"])
def backward(
    grad: tl.tensor,
    x: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    grad_x: tl.tensor,
    gain_parts: tl.tensor,
    gain: tl.tensor,
    eps: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    grad_batch_stride: tl.tensor,
    grad_token_stride: tl.tensor,
    grad_head_stride: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """The gradient turned back by the angle, then through the norm of x unless x is None; this program's part of the
    sum over its rows that the gain's gradient is."""
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    real = column < half
    scale1 = tl.full((1, HALF), 1.0, tl.float32)
    scale2 = tl.full((1, HALF), 1.0, tl.float32)
    if gain is not None:
        scale1 = tl.load(gain + column, mask=real, other=0.0).to(tl.float32)
        scale2 = tl.load(gain + half + column, mask=real, other=0.0).to(tl.float32)
    total1 = tl.zeros((ROWS, HALF), tl.float32)
    total2 = tl.zeros((ROWS, HALF), tl.float32)
    for start in range(0, rows, tl.num_programs(0) * ROWS):
        row = start + first
        inside = (row < rows) & real
        angle = (row // heads % length) * half + column
        c = tl.load(cosine + angle, mask=inside, other=0.0)
        s = tl.load(sine + angle, mask=inside, other=0.0)
        begin = grad + _place(row, length, heads, grad_batch_stride, grad_token_stride, grad_head_stride) + column
        dy1 = tl.load(begin, mask=inside, other=0.0).to(tl.float32)
        dy2 = tl.load(begin + half, mask=inside, other=0.0).to(tl.float32)
        d1 = dy1 * c + dy2 * s
        d2 = dy2 * c - dy1 * s
        if x is not None:
            begin = x + _place(row, length, heads, batch_stride, token_stride, head_stride) + column
            v1 = tl.load(begin, mask=inside, other=0.0).to(tl.float32)
            v2 = tl.load(begin + half, mask=inside, other=0.0).to(tl.float32)
            r = tl.rsqrt(tl.sum(v1 * v1 + v2 * v2, axis=1, keep_dims=True) / (2 * half) + eps)
            v1 *= r
            v2 *= r
            if gain_parts is not None:
                total1 += d1 * v1
                total2 += d2 * v2
            d1 *= scale1
            d2 *= scale2
            mean = tl.sum(d1 * v1 + d2 * v2, axis=1, keep_dims=True) / (2 * half)
            d1 = r * (d1 - v1 * mean)
            d2 = r * (d2 - v2 * mean)
        place = row.to(tl.int64) * (2 * half) + column
        tl.store(grad_x + place, d1, mask=inside)
        tl.store(grad_x + place + half, d2, mask=inside)
    if gain_parts is not None:
        columns = tl.arange(0, HALF)
        part = gain_parts + tl.program_id(0) * (2 * half) + columns
        tl.store(part, tl.sum(total1, axis=0), mask=columns < half)
        tl.store(part + half, tl.sum(total2, axis=0), mask=columns < half)
