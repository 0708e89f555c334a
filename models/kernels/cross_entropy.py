"""Of a chunk's logits, where they stand, the loss and its gradient. models/loss.py is what calls this."""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels.launching import kernel, power_of_two, runs_triton

IGNORE = -100  # a target with this value is none, as in torch.nn.functional.cross_entropy
_COLUMNS = 4096  # of a row at once


def cross_entropy_twin(logits: Tensor, targets: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What ``cross_entropy_`` returns, and the gradient, in the dtype of ``logits``, which are overwritten unless they
    are narrower than fp32."""
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    valid = targets.ne(IGNORE)
    target = targets.where(valid, 0).unsqueeze(1)
    own = logits.gather(1, target)
    peak = logits.amax(dim=1, keepdim=True)
    grad = logits.sub_(peak).exp_()  # one exponential serves the loss and the gradient
    total = grad.sum(dim=1, keepdim=True)
    log_z = peak + total.log()
    nll = (log_z - own).squeeze(1) * valid
    log_z_squared = log_z.squeeze(1).square() * valid
    if gradient:
        # d/dlogits of (log_z - own) + z_loss * log_z^2
        grad *= valid.unsqueeze(1) * (1 + 2 * z_loss * log_z) / total
        grad.scatter_add_(1, target, -valid.unsqueeze(1).to(grad.dtype))
        grad = grad.to(dtype)
    return nll, log_z_squared, grad


@torch.library.custom_op("equipoise::cross_entropy_", mutates_args=("logits",))
def _cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor]:
    if not (runs_triton(logits) and logits.stride(1) == 1):
        nll, log_z_squared, grad = cross_entropy_twin(logits, targets, z_loss, gradient)
        if gradient:
            logits.copy_(grad)
        return nll, log_z_squared
    rows, vocabulary = logits.shape
    nll, log_z_squared = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    kernel("cross_entropy", "forward")[(rows,)](
        logits, targets.contiguous(), nll, log_z_squared, vocabulary, logits.stride(0), z_loss,
        IGNORE=IGNORE, GRADIENT=gradient, COLUMNS=min(power_of_two(vocabulary), _COLUMNS), num_warps=8,
    )  # fmt: skip
    return nll, log_z_squared


@_cross_entropy_.register_fake
def _(logits: Tensor, targets: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(len(logits), dtype=dtype), logits.new_empty(len(logits), dtype=dtype)


def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """(-log softmax at the target, log Z ** 2), fp32 [rows], 0 where ``targets`` int64 [rows] is ``IGNORE``, of
    ``logits`` [rows, vocabulary], which ``gradient`` overwrites by that of ``nll + z_loss * log_z ** 2``.

    Not differentiable. Without ``gradient`` the logits are not to be used afterwards either.
    """
    return _cross_entropy_(logits, targets, z_loss, gradient)
