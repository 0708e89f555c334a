"""What the optimizers of this room share: an update of local tensors, with moments in any dtype."""

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

    ``found_inf``, fp32 [] on the parameters' device, is what torch's GradScaler gives to fused optimizers: where it is
    1, parameters and state stay as they are bit for bit, whatever the gradients; where it is 0, or None, they move.
    The noise goes on all the same, since the host does not know.
    """

    MOMENTS: ClassVar[tuple[str, ...]]  # their names in the state
    SCALAR: ClassVar[str | None] = None  # the name of a number in each parameter's state, fp32 [] on its device

    found_inf: Tensor | None = None

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
            self._step_group(group)
            if self.storage.is_stochastic and group["lr"] and group["params"]:  # ZeRO-3 hides all groups but one
                group["noise"] += 1
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        rule = self._rule(group)
        for slices, first in self._buckets(group["params"], rule):
            for chunk in chunks(slices):
                before = self._before(chunk)
                moments = self.storage.widen(chunk)
                rule.update(chunk, moments, group, first)
                self.storage.keep(chunk, moments, group.get("noise", 0))
                self._leave_out(before)

    def _rule(self, group: dict[str, Any]) -> type[Elementwise]:
        """Whose update and state names a group has."""
        return type(self)

    @staticmethod
    @abstractmethod
    def update(slices: list[Slice], moments: list[list[Tensor]], group: dict[str, Any], first: bool) -> None:
        """One step for tensors of like device and dtype, none of them empty. ``moments`` has for each of MOMENTS one
        tensor a slice, fp32 or wider, to change in place; ``first`` says that they were created now."""

    def _before(self, slices: list[Slice]) -> list[tuple[Tensor, Tensor]]:
        """What a step changes, and copies of it, if the step may be left out."""
        if self.found_inf is None:
            return []
        changing = [tensor for one in slices for tensor in (one.parameter, *one.moments)]
        return [(tensor, tensor.clone()) for tensor in changing]

    def _leave_out(self, before: list[tuple[Tensor, Tensor]]) -> None:
        """Undo what happened to them if ``found_inf`` says so."""
        for tensor, copy in before:
            assert self.found_inf is not None
            tensor.copy_(torch.where(self.found_inf.bool(), copy, tensor))  # a product with 0 would keep NaNs

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments arrive in their own dtype, not in the parameter's, and what the saved groups lack
        stays as it is."""
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        groups = [kept | saved for kept, saved in zip(own, state_dict["param_groups"], strict=True)]
        super().load_state_dict({"state": {}, "param_groups": groups})
        for saved_group, group in zip(groups, self.param_groups, strict=True):
            rule = self._rule(group)
            for key, parameter in zip(saved_group["params"], group["params"], strict=True):
                if key in state_dict["state"]:
                    saved, device = state_dict["state"][key], parameter.device
                    state = {name: saved[name].to(device, self.storage.dtype) for name in rule.MOMENTS}
                    if rule.SCALAR is not None:
                        state[rule.SCALAR] = saved[rule.SCALAR].to(device, torch.float32)
                    self.state[parameter] = state

    def _state_of(self, parameter: Tensor, rule: type[Elementwise]) -> tuple[dict[str, Tensor], bool]:
        """A parameter's state, and whether it was created now."""
        state = self.state[parameter]
        first = not state
        if first:
            state.update({name: torch.zeros_like(parameter, dtype=self.storage.dtype) for name in rule.MOMENTS})
            if rule.SCALAR is not None:
                state[rule.SCALAR] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return state, first

    def _slice(self, parameter: Tensor, number: int, rule: type[Elementwise]) -> tuple[Slice, bool]:
        """Of the ``number``-th parameter of a group, which has a gradient; and whether its state was created now."""
        state, first = self._state_of(parameter, rule)
        scalar = None if rule.SCALAR is None else state[rule.SCALAR]
        return local_slice(parameter, tuple(state[name] for name in rule.MOMENTS), scalar, number), first

    def _buckets(self, parameters: list[Tensor], rule: type[Elementwise]) -> Iterator[tuple[list[Slice], bool]]:
        """Lists that one foreach call can take (like device and dtype), and whether it is their first step."""
        buckets: dict[tuple[torch.device, torch.dtype, bool], list[Slice]] = defaultdict(list)
        steps: list[Tensor] = []
        for number, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            one, first = self._slice(parameter, number, rule)
            if one.scalar is not None and rule.SCALAR == "step":
                steps.append(one.scalar)
            if one.parameter.numel():
                buckets[one.parameter.device, one.parameter.dtype, first].append(one)
        if steps:  # empty shards count too: any rank's count may be the one that is saved
            torch._foreach_add_(steps, 1.0)
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))
        for (_, _, first), slices in buckets.items():
            yield slices, first
