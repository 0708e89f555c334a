"""Cross-entropy over a large vocabulary in chunks: the logits of the full batch never exist at once.

The gradient with respect to the logits is ``softmax - onehot``, so it is formed while a chunk's logits are at hand,
and only the gradients with respect to the hidden states and the head's weight are kept (the idea of fused linear
cross-entropy, arXiv 2410.10989). No logits are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import IGNORE, cross_entropy_, cross_entropy_twin

__all__ = ["IGNORE", "cross_entropy_sum"]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, chunk: int, train: bool, fused: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        nll = torch.zeros((), dtype=wide, device=hidden.device)
        z = torch.zeros_like(nll)
        grad_hidden = torch.empty_like(hidden) if train else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if train else None
        low = weight.to(hidden.dtype)
        for begin in range(0, len(hidden), chunk):
            rows = hidden[begin : begin + chunk]
            target = targets[begin : begin + chunk]
            if fused:
                grad = F.linear(rows, low)
                own, log_z_squared = cross_entropy_(grad, target, z_loss, train)
            else:
                own, log_z_squared, grad = cross_entropy_twin(F.linear(rows, low), target, z_loss, train)
            nll += own.sum()
            z += log_z_squared.sum()
            if grad_hidden is None or grad_weight is None:
                continue
            torch.mm(grad, low, out=grad_hidden[begin : begin + chunk])
            if wide == hidden.dtype:
                grad_weight.addmm_(grad.T, rows)
            else:
                grad_weight += grad.T @ rows
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll)
        return nll + z_loss * z, nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad * grad_hidden).to(grad_hidden.dtype), grad * grad_weight, None, None, None, None, None


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, chunk: int = 2048, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """Summed loss of ``softmax(hidden @ weight.T)`` against the targets; ``fused``: by the kernel.

    ``hidden`` [tokens, width] in the compute dtype, ``weight`` [vocabulary, width] in fp32, ``targets`` int64
    [tokens] with ``IGNORE`` for none. Returns the differentiable objective (nats, plus
    ``z_loss * sum(log Z ** 2)``, PaLM's z-loss, arXiv 2204.02311) and the plain negative log-likelihood (nats), both
    fp32 scalars summed, not averaged, over the targets.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, z_loss, chunk, torch.is_grad_enabled(), fused)
