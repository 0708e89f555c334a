"""SwiGLU's product ``silu(gate) * up`` (arXiv 2002.05202), of which only gate and up are kept; fp32 inside, rounded
once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.launching import kernel, rows_of, runs_triton, tiled
from models.precision import wide

_ELEMENTS, _COLUMNS = 4096, 1024  # of a program, and of a row at most


def silu_mul_twin(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype)


def silu_mul_backward_twin(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up."""
    dy, g = wide(grad), wide(gate)
    s = torch.sigmoid(g)
    silu = g * s
    return (dy * wide(up) * (s + silu * (1 - s))).to(gate.dtype), (dy * silu).to(up.dtype)


@torch.library.custom_op("equipoise::silu_mul", mutates_args=())
def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    if not runs_triton(gate):
        return silu_mul_twin(gate, up).contiguous()
    y = gate.new_empty(gate.shape)
    g, u = rows_of(gate), rows_of(up)
    rows, width = g.shape
    grid, settings = tiled(rows, width, _ELEMENTS, _COLUMNS)
    kernel("swiglu", "forward")[grid](g, u, y, rows, width, g.stride(0), u.stride(0), **settings)
    return y


@torch.library.custom_op("equipoise::silu_mul_backward", mutates_args=())
def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if not runs_triton(gate):
        grad_gate, grad_up = silu_mul_backward_twin(grad, gate, up)
        return grad_gate.contiguous(), grad_up.contiguous()
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    dy, g, u = rows_of(grad), rows_of(gate), rows_of(up)
    rows, width = g.shape
    grid, settings = tiled(rows, width, _ELEMENTS, _COLUMNS)
    kernel("swiglu", "backward")[grid](
        dy, g, u, grad_gate, grad_up, rows, width, dy.stride(0), g.stride(0), u.stride(0), **settings
    )
    return grad_gate, grad_up


@_silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


_silu_mul.register_autograd(_gradients, setup_context=_keep)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` for two tensors of one shape [..., width], in the dtype of ``gate``."""
    return _silu_mul(gate, up)
