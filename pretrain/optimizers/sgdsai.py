"""SGD-SaI: momentum SGD in which each tensor's learning rate is scaled, once, by its first gradient."""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from pretrain.optimizers.elementwise import Elementwise
from pretrain.optimizers.msgdw import check_range
from pretrain.optimizers.slices import Slice
from pretrain.optimizers.storage import Rounding


class SGDSaI(Elementwise):
    """SGD with Scaling at Initialization, of Xu et al., "No More Adam", arXiv 2412.11768, algorithm 1.

    With gradient g, scheduled learning rate lr, momentum μ and weight decay λ::

        s ← ‖g‖ / (std(g) + ε)       of the whole tensor, at the first step; then it stays
        m ← g                        at the first step
        m ← μ·m + (1 - μ)·g          after it
        p ← (1 - lr·λ) · p
        p ← p - lr · s · m

    For gradients of mean 0, s is √n, n being the tensor's elements: hence learning rates far below mSGDW's. A tensor
    whose first gradient has no spread (one element, as an alpha; or all elements equal, or zero, or not finite) gets
    that √n, where the authors' code divides by ε or never moves it. Their release 1.0.4 also divides s by the
    largest of all tensors, one factor on lr.

    s is in the state (``gsnr``), and each group has the key ``measured``, which state dictionaries carry. A step at
    learning rate 0 measures nothing: so torch creates the state that ``get_optimizer_state_dict`` is asked for.
    Shards sum what s is made of: two numbers a tensor, at that one step.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    SCALAR: ClassVar[str | None] = "gsnr"

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        state_dtype: torch.dtype = torch.float32,
        state_rounding: Rounding = "stochastic",
    ) -> None:
        check_range("optimizer.momentum", momentum, below=1.0)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps, "measured": False}
        super().__init__(params, defaults, state_dtype, state_rounding)

    def _step_group(self, group: dict[str, Any]) -> None:
        measuring = not group["measured"] and group["lr"] > 0
        if measuring:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state, _ = self._state_of(parameter, SGDSaI)
                    state["gsnr"].copy_(signal_to_noise(parameter, group["eps"]))
        super()._step_group(group)
        group["measured"] = group["measured"] or measuring

    @staticmethod
    def update(slices: list[Slice], moments: list[list[Tensor]], group: dict[str, Any], first: bool) -> None:
        lr, momentum = group["lr"], group["momentum"]
        parameters = [one.parameter for one in slices]
        gradients = [one.gradient for one in slices]
        (averages,) = moments

        if group["measured"]:
            torch._foreach_mul_(averages, momentum)
            torch._foreach_add_(averages, gradients, alpha=1.0 - momentum)
        else:
            torch._foreach_copy_(averages, gradients)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
        for one, average in zip(slices, averages, strict=True):
            assert one.scalar is not None
            one.parameter.addcmul_(average, one.scalar.to(average.dtype), value=-lr)


def signal_to_noise(parameter: Tensor, eps: float) -> Tensor:
    """g-SNR of the parameter's gradient, fp64 [], the same on all ranks that share it."""
    gradient, count = parameter.grad, parameter.numel()
    assert gradient is not None
    if isinstance(parameter, DTensor):
        assert isinstance(gradient, DTensor)
        gradient = gradient.redistribute(placements=parameter.placements)  # as local_slice does
    total = _whole(gradient.sum(dtype=torch.float64))
    norm = _whole(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    spread = ((norm.square() - total.square() / count) / (count - 1 or float("nan"))).clamp(min=0.0).sqrt()
    # What is left of fp64 differences of equal numbers, 1e-8 of them, is no spread.
    return torch.where(spread > 1e-6 * norm / sqrt(count), norm / (spread + eps), sqrt(count))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
