"""What mSGDW and AdamW share: an update of each element by itself, on local tensors, with moments in any dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pretrain.optimizers.slices import Slice, chunks, local_slice
from pretrain.optimizers.storage import Rounding, Storage


class Elementwise(torch.optim.Optimizer, ABC):
    """An optimizer whose arithmetic on moments is in fp32 or wider, and whose ``storage`` of them may be bf16.

    It runs on local tensors: plain parameters, DTensors of several meshes and empty shards may stand in one group. A
    moment is a tensor like its parameter (a DTensor of the same placements), for ``torch.distributed.checkpoint``,
    created in the dtype that it is stored in. Nothing in ``step`` waits for the device.

    With stochastic rounding each group has a key ``noise``, which state dictionaries carry: the number of the noise
    that its next step rounds with, from the group's index times 2³² on. A step at learning rate 0 does not advance it:
    so torch creates the state that ``get_optimizer_state_dict`` is asked for before any step.
    """

    MOMENTS: ClassVar[tuple[str, ...]]  # their names in the state
    COUNTS_STEPS: ClassVar[bool] = False  # whether each parameter's state has "step", fp32 [] on its device

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], state_dtype: torch.dtype, state_rounding: Rounding
    ) -> None:
        self.storage = Storage(state_dtype, state_rounding)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.storage.is_stochastic:
            param_group.setdefault("noise", len(self.param_groups) << 32)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient. Returns the closure's value, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            noise = group.get("noise", 0)
            for slices, first in self._buckets(group["params"]):
                for chunk in chunks(slices):
                    moments = self.storage.widen(chunk)
                    self._update(chunk, moments, group, first)
                    self.storage.keep(chunk, moments, noise)
            if self.storage.is_stochastic and group["lr"] and group["params"]:  # ZeRO-3 hides all groups but one
                group["noise"] = noise + 1
        return loss

    @abstractmethod
    def _update(self, slices: list[Slice], moments: list[list[Tensor]], group: dict[str, Any], first: bool) -> None:
        """One step for tensors of like device and dtype, none of them empty. ``moments`` has for each of MOMENTS one
        tensor a slice, fp32 or wider, to change in place; ``first`` says that they were created now."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments arrive in their own dtype, not in the parameter's, and what the saved groups lack
        stays as it is."""
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        groups = [kept | saved for kept, saved in zip(own, state_dict["param_groups"], strict=True)]
        super().load_state_dict({"state": {}, "param_groups": groups})
        keys = [key for group in groups for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            if key in state_dict["state"]:
                saved, device = state_dict["state"][key], parameter.device
                state = {name: saved[name].to(device, self.storage.dtype) for name in self.MOMENTS}
                if self.COUNTS_STEPS:
                    state["step"] = saved["step"].to(device, torch.float32)
                self.state[parameter] = state

    def _buckets(self, parameters: list[Tensor]) -> Iterator[tuple[list[Slice], bool]]:
        """Lists that one foreach call can take (like device and dtype), and whether it is their first step."""
        buckets: dict[tuple[torch.device, torch.dtype, bool], list[Slice]] = defaultdict(list)
        steps: list[Tensor] = []
        for number, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            first = not state
            if first:
                state.update({name: torch.zeros_like(parameter, dtype=self.storage.dtype) for name in self.MOMENTS})
                if self.COUNTS_STEPS:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            step = state.get("step")
            if step is not None:
                steps.append(step)
            one = local_slice(parameter, tuple(state[name] for name in self.MOMENTS), step, number)
            if one.parameter.numel():
                buckets[one.parameter.device, one.parameter.dtype, first].append(one)
        if steps:
            torch._foreach_add_(steps, 1.0)  # empty shards count too: any rank's count may be the one that is saved
        for (_, _, first), slices in buckets.items():
            yield slices, first
