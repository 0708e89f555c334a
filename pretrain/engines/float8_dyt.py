"""DyT and Derf that write torchao's 8-bit tensors: the kernel rounds what it has in registers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.float8.float8_training_tensor import Float8TrainingTensor, GemmInputRole, LinearMMConfig

from models import kernels


@torch._dynamo.allow_in_graph
class Float8DyT(torch.autograd.Function):
    """``kernels.dyt_e4m3`` for linears whose products are ``products``: with a branch the sum as well.

    The rounding's derivative is 1, as in torchao's conversion (the straight-through estimator, arXiv 1308.3432).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        scale: Tensor,
        alpha: Tensor | float,
        gain: Tensor | None,
        beta: Tensor | None,
        shift: Tensor | None,
        function: str,
        products: LinearMMConfig,
    ) -> Any:
        stream, data = kernels.dyt_e4m3(x, branch, scale, alpha, gain, beta, shift, function)
        learned, ctx.fixed = (alpha, None) if isinstance(alpha, Tensor) else (None, alpha)
        ctx.function, ctx.dtypes = function, (x.dtype, None if branch is None else branch.dtype)
        ctx.save_for_backward(stream, learned, gain, beta, shift)
        written = Float8TrainingTensor(data, scale, stream.dtype, products, GemmInputRole.INPUT)
        return written if branch is None else (stream, written)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_stream = grads[0] if len(grads) > 1 else None
        stream, learned, gain, beta, shift = ctx.saved_tensors
        alpha = ctx.fixed if learned is None else learned
        dx, *others = kernels.dyt_gradients(grads[-1], stream, grad_stream, alpha, gain, beta, shift, ctx.function)
        of_x, of_branch = ctx.dtypes
        return dx.to(of_x), None if of_branch is None else dx.to(of_branch), None, *others, None, None
