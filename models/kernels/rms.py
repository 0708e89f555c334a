"""RMSNorm (arXiv 1910.07467), alone and around the addition of a branch to the stream.

What stands between a branch and the next is ``x + branch`` and then a norm (LLaMA), ``x + norm(branch)`` (DNT), or that
and a norm after it (Peri-LN): one forward kernel with each part left out where it has none, one backward kernel of a
norm with the stream's own gradient added to it. Nothing but inputs is kept, 1/rms least of all: it costs nothing
where the row is at hand.

PyTorch's own fused kernel takes gains in the dtype of the input alone. Ours are fp32: beside a bf16 stream it would be
three kernels and 20 bytes an element in place of 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels.launching import adders, empty_sum, kernel, rows_of, runs_triton, tile, warps
from models.precision import wide

_ELEMENTS = 2048  # of a program, if a row has fewer


def _normalized(v: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return v if gain is None else gain * v


def rms_norm_twin(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """``gain * x / sqrt(mean(x^2) + eps)`` in fp32, in the dtype of x."""
    return _normalized(wide(x), gain, eps).to(x.dtype)


def rms_norm_add_twin(x: Tensor, branch: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """``x + rms(branch)``, rounded once."""
    return (wide(x) + _normalized(wide(branch), gain, eps)).to(torch.promote_types(x.dtype, branch.dtype))


def rms_norm_backward_twin(
    grad: Tensor, x: Tensor, grad_stream: Tensor | None, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """What ``_backward`` returns."""
    v, dy = wide(x), wide(grad)
    r = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    n = v * r
    g = dy if gain is None else dy * gain
    dx = r * (g - n * (g * n).mean(-1, keepdim=True))
    dx = dx if grad_stream is None else dx + wide(grad_stream)
    grad_gain = dy.new_empty(0) if gain is None else (dy * n).sum(tuple(range(x.dim() - 1)))
    return dx.to(x.dtype), grad_gain


def _launch(
    x: Tensor,
    branch: Tensor | None,
    stream: Tensor | None,
    y: Tensor | None,
    branch_gain: Tensor | None,
    gain: Tensor | None,
    branch_eps: float,
    eps: float,
    norm_branch: bool,
) -> None:
    flat, other = rows_of(x), None if branch is None else rows_of(branch)
    rows, width = flat.shape
    block = tile(width, _ELEMENTS)
    kernel("rms", "forward")[(-(-rows // block[0]),)](
        flat, other, stream, y, branch_gain, gain, branch_eps, eps, rows, width,
        flat.stride(0), 0 if other is None else other.stride(0),
        NORM_BRANCH=norm_branch, ROWS=block[0], COLUMNS=block[1], num_warps=warps(block[0] * block[1]),
    )  # fmt: skip


@torch.library.custom_op("equipoise::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if not runs_triton(x, whole_rows=True):
        return rms_norm_twin(x, gain, eps).contiguous()
    y = x.new_empty(x.shape)
    _launch(x, None, None, y, None, gain, 0.0, eps, False)
    return y


@torch.library.custom_op("equipoise::rms_norm_add", mutates_args=())
def _rms_norm_add(x: Tensor, branch: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if not runs_triton(x, whole_rows=True):
        return rms_norm_add_twin(x, branch, gain, eps).contiguous()
    stream = empty_sum(x, branch)
    _launch(x, branch, stream, None, gain, None, eps, 0.0, True)
    return stream


@torch.library.custom_op("equipoise::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor,
    branch: Tensor,
    branch_gain: Tensor | None,
    gain: Tensor | None,
    branch_eps: float,
    eps: float,
    norm_branch: bool,
) -> tuple[Tensor, Tensor]:
    if runs_triton(x, whole_rows=True):
        stream, y = empty_sum(x, branch), empty_sum(x, branch)
        _launch(x, branch, stream, y, branch_gain, gain, branch_eps, eps, norm_branch)
        return stream, y
    stream = rms_norm_add_twin(x, branch, branch_gain, branch_eps) if norm_branch else x + branch
    stream = stream.contiguous()
    return stream, rms_norm_twin(stream, gain, eps)


@torch.library.custom_op("equipoise::rms_norm_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, grad_stream: Tensor | None, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Of x, with ``grad_stream`` added, and of the gain, fp32 [width], or [0] without one."""
    if not runs_triton(x, whole_rows=True):
        dx, grad_gain = rms_norm_backward_twin(grad, x, grad_stream, gain, eps)
        return dx.contiguous(), grad_gain
    dy, flat, more = rows_of(grad), rows_of(x), None if grad_stream is None else rows_of(grad_stream)
    rows, width = flat.shape
    block = tile(width, _ELEMENTS)
    threads = warps(block[0] * block[1])
    programs = adders(x, -(-rows // block[0]), 16 // threads)
    dx = x.new_empty(x.shape)
    parts = None if gain is None else x.new_empty(programs, width, dtype=torch.float32)
    kernel("rms", "backward")[(programs,)](
        dy, flat, more, dx, parts, gain, eps, rows, width,
        dy.stride(0), flat.stride(0), 0 if more is None else more.stride(0),
        ROWS=block[0], COLUMNS=block[1], num_warps=threads,
    )  # fmt: skip
    return dx, x.new_empty(0, dtype=torch.float32) if parts is None else parts.sum(0)


@_rms_norm.register_fake
def _(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_rms_norm_add.register_fake
def _(x: Tensor, branch: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return empty_sum(x, branch)


@_add_rms_norm.register_fake
def _(x: Tensor, branch: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return empty_sum(x, branch), empty_sum(x, branch)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, grad_stream: Tensor | None, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(0 if gain is None else x.shape[-1], dtype=dtype)


def _of_norm(
    grad: Tensor, x: Tensor, grad_stream: Tensor | None, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    dx, grad_gain = _backward(grad, x, grad_stream, gain, eps)
    return dx, None if gain is None else grad_gain.to(gain.dtype)


def _keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gain, ctx.eps = inputs
    ctx.save_for_backward(x, gain)


def _rms_norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, gain = ctx.saved_tensors
    return *_of_norm(grad, x, None, gain, ctx.eps), None


def _keep_rms_norm_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, branch, gain, ctx.eps = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(branch, gain)


def _rms_norm_add_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch, gain = ctx.saved_tensors
    return grad.to(ctx.dtype), *_of_norm(grad, branch, None, gain, ctx.eps), None


def _keep_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, branch_gain, gain, ctx.branch_eps, ctx.eps, ctx.norm_branch = inputs
    ctx.dtypes = x.dtype, branch.dtype
    ctx.save_for_backward(output[0], branch if ctx.norm_branch else None, branch_gain, gain)


def _add_rms_norm_gradients(ctx: Any, grad_stream: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    stream, branch, branch_gain, gain = ctx.saved_tensors
    dx, grad_gain = _of_norm(grad, stream, grad_stream, gain, ctx.eps)
    grad_branch, grad_branch_gain = dx.to(ctx.dtypes[1]), None
    if ctx.norm_branch:
        grad_branch, grad_branch_gain = _of_norm(dx, branch, None, branch_gain, ctx.branch_eps)
    return dx.to(ctx.dtypes[0]), grad_branch, grad_branch_gain, grad_gain, None, None, None


_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_keep_rms_norm)
_rms_norm_add.register_autograd(_rms_norm_add_gradients, setup_context=_keep_rms_norm_add)
_add_rms_norm.register_autograd(_add_rms_norm_gradients, setup_context=_keep_add_rms_norm)


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """``gain * x / sqrt(mean(x^2) + eps)`` of ``x`` [..., width], in its dtype; ``gain`` is fp32 [width]."""
    return _rms_norm(x, gain, eps)


def rms_norm_add(x: Tensor, branch: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """``x + rms_norm(branch)``, rounded once."""
    return _rms_norm_add(x, branch, gain, eps)


def add_rms_norm(x: Tensor, branch: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``(x + branch, rms_norm(x + branch))``, of the sum as it is rounded."""
    return _add_rms_norm(x, branch, None, gain, 0.0, eps, False)


def rms_norm_add_rms_norm(
    x: Tensor, branch: Tensor, branch_gain: Tensor | None, branch_eps: float, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``(s, rms_norm(s))`` with ``s = x + rms_norm(branch)``."""
    return _add_rms_norm(x, branch, branch_gain, gain, branch_eps, eps, True)
