"""AdamW whose moments are kept in bf16. In fp32, torch's own fused AdamW is the same thing."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pretrain.optimizers.elementwise import Elementwise
from pretrain.optimizers.slices import Slice
from pretrain.optimizers.storage import Rounding


class CompactAdamW(Elementwise):
    """AdamW with bf16 moments: half the memory of the state.

    A step is torch's: the moments are widened to fp32, the kernel of ``torch.optim.AdamW(fused=True)`` moves the
    parameter and them, and they are rounded back to bf16. The names and shapes of the state are torch's too (``step``,
    ``exp_avg``, ``exp_avg_sq``), so that either loads the other's. Parameters are fp32.

    The second moment is why rounding is stochastic unless asked otherwise: a step changes it by 1 - β₂ of a
    difference, at β₂ = 0.999 less than the half of a bf16 step (2⁻⁹ to 2⁻⁸ of the value) as long as the squared
    gradient is below about three times the moment. Rounded to nearest, it then stays where it is.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    SCALAR: ClassVar[str | None] = "step"

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.bfloat16,
        state_rounding: Rounding = "stochastic",
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, state_dtype, state_rounding
        )

    @staticmethod
    def update(slices: list[Slice], moments: list[list[Tensor]], group: dict[str, Any], first: bool) -> None:
        parameters = [one.parameter for one in slices]
        assert parameters[0].dtype == torch.float32
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            parameters,
            [one.gradient for one in slices],
            moments[0],
            moments[1],
            [],
            [one.scalar for one in slices if one.scalar is not None],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
