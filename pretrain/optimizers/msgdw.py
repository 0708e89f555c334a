"""mSGDW: momentum SGD with decoupled weight decay, the optimizer DNT was made for."""

from __future__ import annotations

from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from models.errors import ConfigError
from pretrain.optimizers.elementwise import Elementwise
from pretrain.optimizers.slices import Slice
from pretrain.optimizers.storage import Rounding


class MSGDW(Elementwise):
    """Momentum SGD with decoupled weight decay.

    With gradient g, scheduled learning rate lr, momentum μ, weight decay λ and dampening δ, one step is::

        p ← (1 - lr·λ) · p
        m ← g                        at a parameter's first step
        m ← μ·m + (1 - δ)·g          after it
        p ← p - lr · m               or p - lr · (g + μ·m) with Nesterov

    The decay is multiplied by the scheduled learning rate and applied once per parameter. With δ = 0 the step
    under a constant gradient grows to lr/(1 - μ): ten times lr at μ = 0.9. An undampened first step is torch's
    and timm's convention too. A state that ``get_optimizer_state_dict`` creates before any step is m = 0; the
    first step then equals the above except under δ > 0, where g enters it times 1 - δ.

    ``state_dtype`` is the momentum's storage alone: in bf16 it is rounded once a step, after the parameter has moved
    by the unrounded value. That halves the optimizer's memory. Rounded to nearest, it loses what a step changes in m
    by less than 2⁻⁹ of it; stochastically, it keeps that on average.

    Raises:
        ConfigError: a setting is out of its range, or Nesterov is asked for together with dampening.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        state_dtype: torch.dtype = torch.float32,
        state_rounding: Rounding = "stochastic",
    ) -> None:
        check_range("optimizer.lr", lr)
        check_range("optimizer.weight_decay", weight_decay)
        defaults = {"lr": lr, "weight_decay": weight_decay, **self.settings(momentum, dampening, nesterov)}
        super().__init__(params, defaults, state_dtype, state_rounding)

    @staticmethod
    def settings(momentum: float, dampening: float, nesterov: bool) -> dict[str, Any]:
        """What ``update`` finds in its group beside the learning rate and the decay."""
        check_range("optimizer.momentum", momentum, below=1.0)
        check_range("optimizer.dampening", dampening, below=1.0)
        if nesterov and (dampening or not momentum):
            raise ConfigError(
                f"optimizer.nesterov needs momentum above 0 and dampening 0, not {momentum} and {dampening}"
            )
        return {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}

    @staticmethod
    def update(slices: list[Slice], moments: list[list[Tensor]], group: dict[str, Any], first: bool) -> None:
        lr, momentum = group["lr"], group["momentum"]
        parameters = [one.parameter for one in slices]
        gradients = [one.gradient for one in slices]
        (updates,) = moments

        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
        torch._foreach_mul_(updates, momentum)
        torch._foreach_add_(updates, gradients, alpha=1.0 if first else 1.0 - group["dampening"])
        if group["nesterov"]:
            updates = list(torch._foreach_mul(updates, momentum))
            torch._foreach_add_(updates, gradients)
        torch._foreach_add_(parameters, updates, alpha=-lr)


def check_range(key: str, value: float, below: float = inf) -> None:
    """Raise ConfigError unless ``value`` is a number from 0 up to, not including, ``below``."""
    if not 0.0 <= value < below:
        wanted = f"from 0 up to, not including, {below:g}" if below < inf else "that is not negative"
        raise ConfigError(f"{key} is {value}: write a number {wanted}")
