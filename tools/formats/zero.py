"""Whole tensors from what ZeRO's ranks saved, each its partition of all parameters flattened.

Stages 1 and 2 flatten a group of parameters, with padding after some, and cut that into as many partitions as there are
ranks; stage 3 cuts every parameter. Only the part of a file that a tensor needs is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import ConfigError
from tools.formats.files import member, read_pickle
from tools.formats.lazy import LazyTensor, StoredTensor

Pieces = Sequence[LazyTensor]  # flat, to be read one after the other


class _Opaque:
    """Stands for an object of DeepSpeed's of which nothing is needed."""

    def __init__(self, *_: object) -> None: ...


class _Stage(int):
    """Stands for ZeroStageEnum."""


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Opaque, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def stand_ins() -> AbstractContextManager[None]:
    """Within it, torch.load(weights_only=True) builds objects without content where a file has DeepSpeed's own."""
    return torch.serialization.safe_globals(_STAND_INS)


def read(place: Path, allow_pickle: bool) -> tuple[dict[str, LazyTensor], dict[str, Any], int]:
    """(weights by name, optimizer state as a checkpoint of ours has it, step) of the folder ``global_stepN``."""
    models = _files(place, "model_states")
    with stand_ins():
        described = read_pickle(models[0], allow_pickle)
        ranks = [read_pickle(path, allow_pickle) for path in _files(place, "optim_states")]
    try:
        step = int(described["global_steps"])
        if described.get("frozen_param_shapes"):
            raise ConfigError(f"{place} has frozen parameters, which are not read")
        if not ranks:
            return _unpartitioned(described, step)
        states = [rank["optimizer_state_dict"] for rank in ranks]
        counts = states[0]["partition_count"]
        expected = max(counts) if isinstance(counts, list) else counts
        if expected != len(ranks):
            raise ConfigError(f"{place} has the files of {len(ranks)} of {expected} ranks: it is not complete")
        partitions = _Cut(states) if int(states[0]["zero_stage"]) == 3 else _Flattened(states)
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in described["param_shapes"]]
        return partitions.weights(shapes), partitions.state(shapes), step
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{place} is laid out in a way that is not known here: {error!r}") from None


def _files(place: Path, kind: str) -> list[Path]:
    """By data-parallel rank."""
    found = {}
    for path in place.glob(f"*_{kind}.pt"):
        match = re.fullmatch(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_\w+\.pt", path.name)
        if match is None or int(match[2]):
            raise ConfigError(f"{path} is of a model that was split among ranks, not only its state: it is not read")
        found[int(match[1] or 0)] = member(place, path.name)
    if kind == "model_states" and not found:
        raise ConfigError(f"{place} has no *_model_states.pt: it is not complete")
    return [found[rank] for rank in sorted(found)]


def _unpartitioned(described: Mapping[str, Any], step: int) -> tuple[dict[str, LazyTensor], dict[str, Any], int]:
    """Stage 0: the model's and the optimizer's own state dicts."""
    model = {n: t for n, t in described["module"].items() if n not in described["buffer_names"]}
    optimizer = described["optimizer"]
    state: dict[str, Any] = group_values(optimizer["param_groups"], [])
    for group in optimizer["param_groups"]:
        for name, number in zip(group.get("param_names", []), group["params"], strict=False):
            values = optimizer["state"].get(number, {})
            state |= {f"state.{name}.{key}": value for key, value in values.items()}
    return model, state, step


def group_values(groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """``param_groups.NAME.KEY`` -> value; ``names`` are the groups' parameters where they do not say themselves."""
    flat: dict[str, Any] = {}
    for index, group in enumerate(groups):
        for name in group.get("param_names", names[index] if index < len(names) else []):
            flat |= {f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"}
    return flat


def _section(pieces: Pieces, begin: int, count: int) -> Tensor:
    """``count`` values from the ``begin``-th on of the pieces one after the other."""
    parts = []
    for piece in pieces:
        size = math.prod(piece.shape)
        first, last = max(begin, 0), min(begin + count, size)
        if first < last:
            assert isinstance(piece, StoredTensor), "torch.save lays flat tensors out as they are"
            parts.append(piece.part(first, last - first))
        begin -= size
    found = torch.cat(parts) if parts else torch.empty(0)
    if len(found) != count:
        raise ConfigError(f"the ranks' files hold {len(found)} of {count} values of a parameter: they are not complete")
    return found


class _Flattened:
    """Stages 1 and 2."""

    def __init__(self, states: list[Mapping[str, Any]]) -> None:
        self._states = states
        self._bases = [state["base_optimizer_state"] for state in states]

    def weights(self, shapes: list[dict[str, tuple[int, ...]]]) -> dict[str, LazyTensor]:
        found: dict[str, LazyTensor] = {}
        for group, members in enumerate(shapes):
            pieces = [state["single_partition_of_fp32_groups"][group] for state in self._states]
            found |= self._whole(pieces, members, group)
        return found

    def state(self, shapes: list[dict[str, tuple[int, ...]]]) -> dict[str, Any]:
        """As a checkpoint of ours has it."""
        flat: dict[str, Any] = {}
        for group, members in enumerate(shapes):
            values = [base["state"].get(group, {}) for base in self._bases]
            for key, value in values[0].items():
                if isinstance(value, LazyTensor) and value.shape:
                    whole = self._whole([own[key] for own in values], members, group)
                    flat |= {f"state.{name}.{key}": tensor for name, tensor in whole.items()}
                else:
                    flat |= {f"state.{name}.{key}": value for name in members}
        return flat | group_values(self._bases[0]["param_groups"], [list(members) for members in shapes])

    def _whole(self, pieces: Pieces, members: dict[str, tuple[int, ...]], group: int) -> dict[str, LazyTensor]:
        paddings = self._states[0].get("param_alignment_paddings")
        whole: dict[str, LazyTensor] = {}
        offset = 0
        for index, (name, shape) in enumerate(members.items()):
            count = math.prod(shape)
            whole[name] = _lazily(lambda b=offset, c=count: _section(pieces, b, c), shape, pieces[0].dtype)  # type: ignore[misc]
            offset += count + (paddings[group][index] if paddings else 0)
        return whole


class _Cut:
    """Stage 3: of every parameter each rank has an equal part, the last one's filled up."""

    def __init__(self, states: list[Mapping[str, Any]]) -> None:
        self._states = states
        self._bases = [state["optimizer_state_dict"] for state in states]

    def weights(self, shapes: list[dict[str, tuple[int, ...]]]) -> dict[str, LazyTensor]:
        return self._whole([state["fp32_flat_groups"] for state in self._states], shapes)

    def state(self, shapes: list[dict[str, tuple[int, ...]]]) -> dict[str, Any]:
        """As a checkpoint of ours has it."""
        flat: dict[str, Any] = {}
        numbers = sorted(self._bases[0]["state"])
        for key, value in self._bases[0]["state"][numbers[0]].items() if numbers else []:
            if isinstance(value, LazyTensor) and value.shape:
                pieces = [[base["state"][number][key] for number in numbers] for base in self._bases]
                flat |= {f"state.{name}.{key}": tensor for name, tensor in self._whole(pieces, shapes).items()}
            else:
                flat |= {f"state.{name}.{key}": value for members in shapes for name in members}
        return flat | group_values(self._bases[0]["param_groups"], [list(members) for members in shapes])

    def _whole(self, ranks: Sequence[Pieces], shapes: list[dict[str, tuple[int, ...]]]) -> dict[str, LazyTensor]:
        whole: dict[str, LazyTensor] = {}
        offset = 0
        for name, shape in ((name, shape) for members in shapes for name, shape in members.items()):
            count = math.prod(shape)
            part = -(-count // len(ranks))

            def read(begin: int = offset, count: int = count, part: int = part) -> Tensor:
                return torch.cat([_section(pieces, begin, part) for pieces in ranks])[:count].clone()

            whole[name] = _lazily(read, shape, ranks[0][0].dtype)
            offset += part
        return whole


def _lazily(read: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda: read().view(shape))
