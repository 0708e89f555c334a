"""Lion: every element moves by the learning rate, in the direction of a momentum."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pretrain.optimizers.elementwise import Elementwise
from pretrain.optimizers.msgdw import check_range
from pretrain.optimizers.slices import Slice
from pretrain.optimizers.storage import Rounding


class Lion(Elementwise):
    """Lion, of Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2.

    With gradient g, scheduled learning rate lr, weight decay λ::

        p ← (1 - lr·λ) · p
        p ← p - lr · sign(β₁·m + (1 - β₁)·g)
        m ← β₂·m + (1 - β₂)·g                   from m = 0

    The authors take a learning rate 3 to 10 times smaller than AdamW's, and a decay as much larger. The state has the
    name that timm's and lucidrains's have (``exp_avg``). Written here because theirs know neither bf16 moments nor
    DTensors of several meshes in one group.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
        state_rounding: Rounding = "stochastic",
    ) -> None:
        for name, beta in zip(("beta1", "beta2"), betas, strict=True):
            check_range(f"optimizer.lion.{name}", beta, below=1.0)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, state_dtype, state_rounding)

    @staticmethod
    def update(slices: list[Slice], moments: list[list[Tensor]], group: dict[str, Any], first: bool) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        parameters = [one.parameter for one in slices]
        gradients = [one.gradient for one in slices]
        (averages,) = moments

        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
        updates = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(updates, gradients, alpha=1.0 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_add_(parameters, updates, alpha=-lr)
        torch._foreach_mul_(averages, beta2)
        torch._foreach_add_(averages, gradients, alpha=1.0 - beta2)
