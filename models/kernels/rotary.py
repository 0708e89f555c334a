"""RoPE (arXiv 2104.09864) of queries or keys, alone or after RMSNorm of each head, in one pass.

Heads are [batch, length, heads, head width], as a linear gives them, with any strides but between the elements of a
head. The features i and i + half make a pair, as models/rotary.py has them. fp32 inside, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels.launching import adders, kernel, power_of_two, runs_triton, tile, warps
from models.kernels.rms import rms_norm_backward_twin
from models.precision import wide
from models.rotary import turned

_ELEMENTS = 2048  # of a program: 16 heads of 128


def _turned(v: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return turned(v, cosine.unsqueeze(1), sine.unsqueeze(1))  # the same for all heads


def rotate_twin(x: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor | None, eps: float | None) -> Tensor:
    """RoPE of the heads, with ``eps`` of their RMSNorm."""
    v = wide(x)
    if eps is not None:
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
        v = v if gain is None else gain * v
    return _turned(v, cosine, sine).to(x.dtype)


def rotate_backward_twin(
    grad: Tensor, x: Tensor | None, cosine: Tensor, sine: Tensor, gain: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """What ``_backward`` returns."""
    d = _turned(wide(grad), cosine, -sine)
    if x is None or eps is None:
        return d.to(grad.dtype), d.new_empty(0)
    return rms_norm_backward_twin(d, x, None, gain, eps)


def _strided(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("equipoise::rotate", mutates_args=())
def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor | None, eps: float | None) -> Tensor:
    if not runs_triton(x, whole_rows=True):
        return rotate_twin(x, cosine, sine, gain, eps).contiguous()
    x = _strided(x)
    _, length, heads, features = x.shape
    y = x.new_empty(x.shape)
    rows = x.numel() // features
    block = tile(features, _ELEMENTS)
    kernel("rotary", "forward")[(-(-rows // block[0]),)](
        x, cosine.contiguous(), sine.contiguous(), y, gain, eps or 0.0, rows, length, heads, features // 2,
        *x.stride()[:3], NORM=eps is not None, ROWS=block[0], HALF=power_of_two(features // 2),
        num_warps=warps(block[0] * block[1]),
    )  # fmt: skip
    return y


@torch.library.custom_op("equipoise::rotate_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor | None, cosine: Tensor, sine: Tensor, gain: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Of x, which is None where there is no norm, and of the gain, fp32 [head width], or [0] without one."""
    if not runs_triton(grad, whole_rows=True):
        dx, grad_gain = rotate_backward_twin(grad, x, cosine, sine, gain, eps)
        return dx.contiguous(), grad_gain
    grad, x = _strided(grad), None if x is None else _strided(x)
    _, length, heads, features = grad.shape
    dx = grad.new_empty(grad.shape, dtype=grad.dtype if x is None else x.dtype)
    rows = grad.numel() // features
    block = tile(features, _ELEMENTS)
    threads, tiles = warps(block[0] * block[1]), -(-rows // block[0])
    programs = tiles if gain is None else adders(grad, tiles, 16 // threads)
    parts = None if gain is None else grad.new_empty(programs, features, dtype=torch.float32)
    kernel("rotary", "backward")[(programs,)](
        grad, x, cosine.contiguous(), sine.contiguous(), dx, parts, gain, eps or 0.0, rows, length, heads,
        features // 2, *grad.stride()[:3], *((0, 0, 0) if x is None else x.stride()[:3]),
        ROWS=block[0], HALF=power_of_two(features // 2), num_warps=threads,
    )  # fmt: skip
    return dx, grad.new_empty(0, dtype=torch.float32) if parts is None else parts.sum(0)


@_rotate.register_fake
def _(x: Tensor, *settings: Any) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor | None, cosine: Tensor, sine: Tensor, gain: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    wanted = grad.new_empty(0 if gain is None else grad.shape[-1], dtype=torch.promote_types(grad.dtype, torch.float32))
    return grad.new_empty(grad.shape, dtype=grad.dtype if x is None else x.dtype), wanted


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cosine, sine, gain, ctx.eps = inputs
    ctx.save_for_backward(None if ctx.eps is None else x, cosine, sine, gain)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, cosine, sine, gain = ctx.saved_tensors
    dx, grad_gain = _backward(grad, x, cosine, sine, gain, ctx.eps)
    return dx, None, None, None if gain is None else grad_gain.to(gain.dtype), None


_rotate.register_autograd(_gradients, setup_context=_keep)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``x`` [batch, length, heads, head width] turned by the angles of ``cosine`` and ``sine``, which are fp32 [length,
    head width / 2] and get no gradient."""
    return _rotate(x, cosine, sine, None, None)


def rms_norm_rotate(x: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """``rotate`` of each head's RMSNorm; ``gain`` fp32 [head width]."""
    return _rotate(x, cosine, sine, gain, eps)
