"""RoPE (arXiv 2104.09864): queries and keys turned by the angles of their positions.

Features i and i + half make a pair, as in transformers' LLaMA, so that converted weights keep their order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.precision import wide


def rotary_table(length: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles, fp32 [length, head_width / 2]."""
    frequencies = theta ** -(torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x [batch, heads, length, head width] turned by the angles of ``table``; fp32 inside, rounded once."""
    cosine, sine = table
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RotationOnCPU.apply(x, cosine, sine)
    x1, x2 = wide(x).chunk(2, dim=-1)
    return torch.cat((x1 * cosine - x2 * sine, x2 * cosine + x1 * sine), dim=-1).to(x.dtype)


class _RotationOnCPU(torch.autograd.Function):
    """A product and two sums in place, forward and backward, where a chain has seven operations and as many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return turned(wide(x), cosine, sine).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return turned(wide(grad), cosine, -sine).to(grad.dtype), None, None


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x, fp32 or fp64, turned by the angles; back, with the negative sines. No graph: ``rotate`` is for training."""
    y = x * torch.cat((cosine, cosine), dim=-1)
    (x1, x2), (y1, y2) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    y1.addcmul_(x2, sine, value=-1)
    y2.addcmul_(x1, sine)
    return y
