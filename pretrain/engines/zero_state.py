"""Between DeepSpeed's partitions and the canonical checkpoint.

ZeRO cuts flattened parameters wherever a rank's share ends, differently in every stage, and knows Adam's state names
alone in its own universal checkpoints. Here each tensor is put together, one at a time, and every rank keeps its rows
of it, as FSDP would: what is saved has the model's names and shapes, whatever the optimizer calls its state, and loads
under any engine, stage and world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from models.initialization import chunk_of


def elements(parameter: Any, rank: int) -> range:
    """Of a parameter under stage 3, the elements that this rank holds; its partition may be longer, by padding."""
    size = parameter.ds_tensor.numel()
    return range(min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel))


def write_partition(parameter: Any, part: Tensor, state: str | None = None) -> None:
    """Set this rank's ``elements`` of a parameter under stage 3, fp32 [elements], or of its optimizer state."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    padded = torch.zeros(parameter.ds_tensor.numel(), device=parameter.ds_tensor.device)
    padded[: part.numel()] = part
    if state is not None:
        safe_set_local_optimizer_state(parameter, padded, state)
        return
    safe_set_local_fp32_param(parameter, padded)
    parameter.ds_tensor.data.copy_(padded)


class ZeroState:
    """Reads and writes whole tensors of ``model`` and ``optimizer`` under a ZeRO ``stage``. Collective.

    ``zero`` is DeepSpeed's wrapper of the optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, zero: Any, stage: int) -> None:
        self._optimizer, self._zero, self._stage = optimizer, zero, stage
        self._parameters = dict(model.named_parameters())
        # Groups have names of their own: ZeRO exchanges their parameters for flat partitions.
        self._groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
        size = dist.get_world_size()
        self._mesh = DeviceMesh("cpu", torch.arange(size)) if size > 1 else None

    def _states(self, name: str) -> dict[str, Tensor]:
        """What the optimizer keeps of a parameter on this rank; under stages above 0, where all are alike, that of some
        partition."""
        if self._stage == 0:
            return self._optimizer.state[self._parameters[name]]
        return next(state for state in self._optimizer.state.values() if state)

    def counters(self) -> Iterator[Tensor]:
        """The numbers of steps that states carry."""
        return (state["step"] for state in self._optimizer.state.values() if "step" in state)

    def read(self) -> dict[str, Any]:
        """The canonical tensors, as FSDP has them: DTensors of rows on the CPU, or plain ones of one rank."""
        self._link()
        model = {name: self._own(self._whole(p)) for name, p in self._parameters.items()}
        optimizer: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            for key, held in self._states(name).items():
                value = self._own(self._whole(parameter, key).to(held.dtype)) if held.dim() else held.cpu().clone()
                optimizer[f"state.{name}.{key}"] = value
            group = self._groups[name]
            optimizer |= {f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"}
        return {"model": model, "optimizer": optimizer}

    def write(self, tensors: dict[str, Any]) -> None:
        """What ``read`` returned, with other values in it."""
        self._link()
        saved = tensors["optimizer"]
        for name, parameter in self._parameters.items():
            self._set(parameter, _full(tensors["model"][name]))
            for key, held in self._states(name).items():
                value = saved[f"state.{name}.{key}"]
                if held.dim():
                    self._set(parameter, _full(value), key)
                else:
                    held.copy_(value)
            group = self._groups[name]
            group.update({key: saved[f"param_groups.{name}.{key}"] for key in group if key != "params"})
        for counter in self.counters():  # of every partition
            counter.copy_(saved[f"state.{next(iter(self._parameters))}.step"])

    def copies(self, parameter: Any) -> Iterator[Tensor]:
        """Every tensor of this rank with elements of a parameter: what the forward reads, and the fp32 that an update
        moves. Elementwise changes of all of them, on every rank, change the parameter."""
        if self._stage == 0:
            yield parameter.data
        elif self._stage < 3:
            yield parameter.data
            if parameter._hp_mapping is not None:
                yield parameter._hp_mapping.hp_fragment
        else:
            yield parameter.ds_tensor.data
            if parameter.numel() == parameter.ds_numel:  # a small one that stays gathered
                yield parameter.data
            fp32, _ = self._zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
            yield fp32

    def _link(self) -> None:
        """DeepSpeed 0.19.8 links parameters to their part of the state after the first *group* has its state."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self._stage in (1, 2):
            for group, flat in zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self._optimizer.state)

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Of stages below 3: ``value`` whole, the same on every rank."""
        self._set(self._parameters[name], value)

    def _whole(self, parameter: nn.Parameter, state: str | None = None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            return parameter.detach() if state is None else self._optimizer.state[parameter][state]
        if state is None:
            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = safe_get_full_optimizer_state(parameter, state)
        return whole.view(getattr(parameter, "ds_shape", parameter.shape))

    def _set(self, parameter: Any, value: Tensor, state: str | None = None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._stage == 3:
            mine = elements(parameter, dist.get_rank())
            write_partition(parameter, value.flatten()[mine.start : mine.stop], state)
            if state is None and parameter.numel() == parameter.ds_numel:  # a small one that stays gathered
                parameter.data.copy_(value.view_as(parameter))
        elif state is None:
            value = value.to(parameter.device)
            parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)
        elif self._stage == 0:
            self._optimizer.state[parameter][state].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), state)

    def _own(self, whole: Tensor) -> Tensor:
        if self._mesh is None:
            return whole.cpu().clone()
        rows = chunk_of(range(len(whole)), dist.get_rank(), dist.get_world_size())
        own = whole[rows.start : rows.stop].cpu().clone()
        return DTensor.from_local(
            own, self._mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
        )


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
