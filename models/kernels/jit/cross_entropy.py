"""Of a chunk's logits the loss, and in their place its gradient. A program is a row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(
    logits: tl.tensor,
    targets: tl.tensor,
    nll: tl.tensor,
    log_z_squared: tl.tensor,
    vocabulary: tl.tensor,
    stride: tl.tensor,
    z_loss: tl.tensor,
    IGNORE: tl.constexpr,
    GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The row is read once for its maximum and its sum of exponentials together (arXiv 1805.02867), each place of the
    block for itself, and once more, from the cache, to be overwritten."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    valid = target != IGNORE
    own = tl.load(logits + tl.where(valid, target, 0)).to(tl.float32)
    column = tl.arange(0, COLUMNS)
    peaks = tl.full((COLUMNS,), -3.4e38, tl.float32)  # finite: -inf - -inf is none
    sums = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, vocabulary, COLUMNS):
        v = tl.load(logits + begin + column, mask=begin + column < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peaks, v)
        sums = sums * tl.exp(peaks - higher) + tl.exp(v - higher)
        peaks = higher
    peak = tl.max(peaks, axis=0)
    total = tl.sum(sums * tl.exp(peaks - peak), axis=0)
    log_z = peak + tl.log(total)
    tl.store(nll + row, tl.where(valid, log_z - own, 0.0))
    tl.store(log_z_squared + row, tl.where(valid, log_z * log_z, 0.0))
    if GRADIENT:
        scale = tl.where(valid, 1 + 2 * z_loss * log_z, 0.0) / total
        for begin in range(0, vocabulary, COLUMNS):
            inside = begin + column < vocabulary
            v = tl.load(logits + begin + column, mask=inside, other=0.0).to(tl.float32)
            grad = tl.exp(v - peak) * scale - tl.where(valid & (begin + column == target), 1.0, 0.0)
            tl.store(logits + begin + column, grad, mask=inside)
