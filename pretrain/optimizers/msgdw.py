"""mSGDW: momentum SGD with decoupled weight decay, the optimizer DNT was made for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from models.errors import ConfigError

# Temporaries (Nesterov's look-ahead, a momentum widened from bf16) exist for this many elements at a time, so
# that a 7B model stepping on one GPU does not pay for a second copy of its momentum: 64 MiB in fp32.
_CHUNK_ELEMENTS = 2**24


class _Slice(NamedTuple):
    """One parameter as this rank holds it: plain local tensors, never empty."""

    parameter: Tensor
    gradient: Tensor
    momentum: Tensor


class MSGDW(torch.optim.Optimizer):
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

    All arithmetic on m is in fp32 or wider. ``momentum_dtype`` is its storage alone: in bf16 it is rounded to
    nearest once a step, after the parameter has moved by the unrounded value. That halves the optimizer's
    memory and loses what a step changes in m by less than about 2⁻⁹ of it.

    The update is elementwise, so it runs on local tensors: plain parameters, DTensors of several meshes and
    empty shards may stand in one group. The momentum itself is a tensor like its parameter (a DTensor of the
    same placements), for ``torch.distributed.checkpoint``. Nothing in ``step`` waits for the device.

    Raises:
        ConfigError: a setting is out of its range, or Nesterov is asked for together with dampening.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        momentum_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_range("optimizer.lr", lr)
        check_range("optimizer.momentum", momentum, below=1.0)
        check_range("optimizer.weight_decay", weight_decay)
        check_range("optimizer.dampening", dampening, below=1.0)
        if nesterov and (dampening or not momentum):
            raise ConfigError(
                f"optimizer.nesterov needs momentum above 0 and dampening 0, not {momentum} and {dampening}"
            )
        assert momentum_dtype.is_floating_point
        self.momentum_dtype = momentum_dtype
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "dampening": dampening,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient. Returns the closure's value, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for slices, first in self._buckets(group["params"]):
                gain = 1.0 if first else 1.0 - group["dampening"]
                for chunk in _chunks(slices):
                    _update(chunk, group, gain)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the momentum arrives in ``momentum_dtype``, not in the parameter's dtype."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            if key in state_dict["state"]:
                momentum = state_dict["state"][key]["momentum_buffer"]
                momentum = momentum.to(device=parameter.device, dtype=self.momentum_dtype)
                self.state[parameter] = {"momentum_buffer": momentum}

    def _buckets(self, parameters: list[Tensor]) -> Iterator[tuple[list[_Slice], bool]]:
        """Lists that one foreach call can take (like device and dtype), and whether it is their first step."""
        buckets: dict[tuple[torch.device, torch.dtype, bool], list[_Slice]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            first = not state
            if first:
                state["momentum_buffer"] = torch.zeros_like(parameter, dtype=self.momentum_dtype)
            one = _local(parameter, parameter.grad, state["momentum_buffer"])
            if one.parameter.numel():
                buckets[one.parameter.device, one.parameter.dtype, first].append(one)
        for (_, _, first), slices in buckets.items():
            yield slices, first


def check_range(key: str, value: float, below: float = inf) -> None:
    """Raise ConfigError unless ``value`` is a number from 0 up to, not including, ``below``."""
    if not 0.0 <= value < below:
        wanted = f"from 0 up to, not including, {below:g}" if below < inf else "that is not negative"
        raise ConfigError(f"{key} is {value}: write a number {wanted}")


def _local(parameter: Tensor, gradient: Tensor, momentum: Tensor) -> _Slice:
    if not isinstance(parameter, DTensor):
        return _Slice(parameter, gradient, momentum)
    assert isinstance(gradient, DTensor)
    assert isinstance(momentum, DTensor)
    # Under sequence parallelism a replicated gain gets a partial gradient; where they agree this does nothing.
    gradient = gradient.redistribute(placements=parameter.placements)
    return _Slice(parameter.to_local(), gradient.to_local(), momentum.to_local())


def _chunks(slices: list[_Slice]) -> Iterator[list[_Slice]]:
    chunk: list[_Slice] = []
    elements = 0
    for one in slices:
        if chunk and elements + one.parameter.numel() > _CHUNK_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(one)
        elements += one.parameter.numel()
    yield chunk


def _update(slices: list[_Slice], group: dict[str, Any], gain: float) -> None:
    """The formula of the class, for tensors of like device and dtype; the gradient enters m times ``gain``."""
    lr, momentum = group["lr"], group["momentum"]
    parameters = [one.parameter for one in slices]
    gradients = [one.gradient for one in slices]
    stored = [one.momentum for one in slices]

    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
    wide = torch.promote_types(stored[0].dtype, torch.float32)
    moments = stored if stored[0].dtype == wide else [tensor.to(wide) for tensor in stored]
    torch._foreach_mul_(moments, momentum)
    torch._foreach_add_(moments, gradients, alpha=gain)
    updates: list[Tensor] | tuple[Tensor, ...] = moments
    if group["nesterov"]:
        updates = torch._foreach_mul(moments, momentum)
        torch._foreach_add_(updates, gradients)
    torch._foreach_add_(parameters, updates, alpha=-lr)
    if moments is not stored:
        torch._foreach_copy_(stored, moments)
