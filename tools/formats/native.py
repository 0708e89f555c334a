"""A run's folder and the checkpoints in it, read and written tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.utils import _create_file_view

from models.errors import ConfigError
from pretrain.agreement import Ranks
from pretrain.checkpoint import Checkpointer, Committed, commit
from pretrain.checkpoint.manifest import FileRecord, Manifest
from pretrain.checkpoint.tensors import Writer, read_metadata
from pretrain.checkpoint.verification import verified
from pretrain.cli import dump
from pretrain.files import write_synced
from pretrain.run import RunFolder
from tools.formats import optimizer
from tools.formats.files import in_archive
from tools.formats.lazy import LazyTensor, cast
from tools.formats.tokenizer import FAST, FILES, HUB_FILES, SENTENCEPIECE
from tools.formats.weights import Weights, checked
from tools.formats.writing import Advance, read_ahead

_EXTRAS = "extras.json"
_NO_RANK = 0  # as world size: no rank saved it, so there is no rank's state to go on with


def read(path: Path, with_optimizer: bool) -> Weights:
    """A run's newest whole checkpoint, or the one whose folder ``path`` is. Every file is checked by its checksum."""
    committed = _committed(path)
    folder = RunFolder(committed.path.parent.parent)
    config = folder.read_config()
    if config.model.vocab_size is None:
        raise ConfigError(f"{folder.config}: model.vocab_size is null: write how many rows the embedding has")
    parts = _parts(committed, read_metadata(committed.path), with_optimizer)
    state: dict[str, Any] | None = None
    if with_optimizer:
        found = parts["optimizer"]
        state = {name: value if isinstance(value, LazyTensor) else value() for name, value in found.items()}
        if not state:
            raise ConfigError(f"{committed.path} holds no optimizer state: leave --optimizer out")
    extras = json.loads((committed.path / _EXTRAS).read_bytes())
    return Weights(
        config,
        checked(config.model, parts["model"], committed.path),
        committed.step,
        extras["data"],
        state,
        _tokenizer(folder),
    )


def _committed(path: Path) -> Committed:
    if match := re.fullmatch(r"step-(\d{8,})", path.resolve().name):
        return verified(Ranks(None), path.resolve().parent, int(match[1]))
    committed = Checkpointer(RunFolder(path).checkpoints, keep=1, keep_every=None).latest()  # reads only
    if committed is None:
        raise ConfigError(f"{path} has no checkpoint yet: train it first, python -m pretrain {path / 'config.yaml'}")
    return committed


def _tokenizer(folder: RunFolder) -> dict[str, bytes]:
    places = [folder.tokenizer, *(folder.path / HUB_FILES / name for name in FILES)]
    return {place.name: place.read_bytes() for place in places if place.is_file()}


def _parts(committed: Committed, metadata: Metadata, with_optimizer: bool) -> dict[str, dict[str, Any]]:
    """ "model" and "optimizer" -> name -> LazyTensor, or what reads a plain value; without optimizer, that is empty."""
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    for flat, entry in metadata.state_dict_metadata.items():
        part, *rest = metadata.planner_data[flat]
        if part not in parts or len(rest) != 1:
            raise ConfigError(f"{committed.path} holds {flat}, which no run here writes: do not trust its source")
        if part == "optimizer" and not with_optimizer:
            continue
        if isinstance(entry, BytesStorageMetadata):
            place = _place(committed, metadata, MetadataIndex(flat))
            parts[part][rest[0]] = partial(_load, *place)
        else:
            parts[part][rest[0]] = _lazy(committed, metadata, flat, entry)
    return parts


def _lazy(committed: Committed, metadata: Metadata, flat: str, entry: TensorStorageMetadata) -> LazyTensor:
    shape, dtype = tuple(entry.size), entry.properties.dtype
    pieces = [(chunk, MetadataIndex(flat, chunk.offsets)) for chunk in entry.chunks]
    if len(pieces) == 1:
        place = _place(committed, metadata, pieces[0][1])
        with FakeTensorMode():  # where its values are, in place of them
            fake = _load(*place)
        assert (tuple(fake.shape), fake.dtype) == (shape, dtype), flat
        return in_archive(fake, *place[:2])

    def read() -> Tensor:  # the chunks of several ranks
        whole = torch.empty(shape, dtype=dtype)
        for chunk, index in pieces:
            section = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[section] = _load(*_place(committed, metadata, index))
        return whole

    return LazyTensor(shape, dtype, read)


def _place(committed: Committed, metadata: Metadata, index: MetadataIndex) -> tuple[Path, int, int]:
    """A file of the checkpoint, and in it the first byte and length of what torch.save wrote."""
    place = metadata.storage_data[index]
    if place.relative_path not in committed.manifest.files:
        raise ConfigError(f"{committed.path} refers to {place.relative_path}, which is none of its files")
    return committed.path / place.relative_path, place.offset, place.length


def _load(path: Path, offset: int, length: int) -> Any:
    with path.open("rb") as file:
        view: Any = _create_file_view(file, offset, length)
        return torch.load(view, weights_only=True, map_location="cpu")


def write(weights: Weights, folder: Path, advance: Advance) -> list[str]:
    """Makes ``folder`` the folder of a run with one committed checkpoint; returns what the user should know of it.

    Weights are fp32, as training holds them. Where it is known what text to go on with, there is optimizer state too,
    a fresh one unless ``weights`` has its own.
    """
    config = weights.config
    tensors: dict[str, dict[str, Any]] = {
        "model": {name: cast(tensor, torch.float32, name) for name, tensor in weights.model.items()}
    }
    notes = []
    if weights.optimizer is not None:
        optimizer.check(weights.optimizer, config)
        tensors["optimizer"] = weights.optimizer
    elif weights.data:
        tensors["optimizer"] = optimizer.fresh(config)
        notes.append("the optimizer starts afresh")
    elif SENTENCEPIECE in weights.tokenizer or FAST not in weights.tokenizer:
        notes.append("it can be evaluated and converted; to train it, convert with --data.path PREPARED_FOLDER")
    checkpoints = folder / "checkpoints"
    commit.begin(checkpoints, weights.step)
    place = commit.partial_path(checkpoints, weights.step)
    sources = tensors | {"model": {name: _exact(tensor, name) for name, tensor in weights.model.items()}}
    flat = {f"{part}.{name}": value for part, values in sources.items() for name, value in values.items()}
    outlines = {part: {name: _outline(value) for name, value in values.items()} for part, values in tensors.items()}
    writer = Writer(place)
    try:
        save(outlines, storage_writer=writer, planner=_Planner(flat, advance), no_dist=True)
    except CheckpointException as failed:  # DCP wraps whatever is raised, KeyboardInterrupt too
        raise next(iter(failed.failures.values()))[0] from None
    write_synced(place / _EXTRAS, json.dumps({"data": weights.data}).encode())
    files = writer.records | {_EXTRAS: FileRecord.of(place / _EXTRAS)}
    commit.commit(checkpoints, Manifest(weights.step, _NO_RANK, files))
    write_synced(folder / "config.yaml", dump(config).encode())
    for name, content in weights.tokenizer.items():
        home = folder if name == SENTENCEPIECE else folder / HUB_FILES
        home.mkdir(exist_ok=True)
        write_synced(home / name, content)
    return notes


def size(weights: Weights) -> int:
    """Bytes of the tensors that `write` writes."""
    state = weights.optimizer
    if state is None and weights.data:
        state = optimizer.fresh(weights.config)
    elements = sum(tensor.bytes // tensor.dtype.itemsize for tensor in weights.model.values())
    return 4 * elements + sum(tensor.bytes for tensor in optimizer.learned(state).values())


def _outline(value: Any) -> Any:
    """Shape and dtype of a tensor, for DCP to plan with."""
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, LazyTensor) else value


def _exact(tensor: LazyTensor, name: str) -> LazyTensor:
    """As it is if fp32 holds its values exactly, so that `read_ahead` makes it fp32 as it reads; else cast to it."""
    widens = torch.promote_types(tensor.dtype, torch.float32) == torch.float32
    return tensor if widens else cast(tensor, torch.float32, name)


class _Planner(DefaultSavePlanner):
    """Has a tensor read while DCP writes the one before, in the dtype of its plan. ``values``: by DCP's flat names."""

    def __init__(self, values: Mapping[str, Any], advance: Advance) -> None:
        super().__init__()
        self._values, self._advance = values, advance
        self._coming: Iterator[tuple[MetadataIndex, Tensor]] = iter(())
        self._given = 0  # bytes of the tensor that DCP writes now

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        dtypes = {item.index: item.tensor_data.properties.dtype for item in plan.items if item.tensor_data is not None}
        tensors = [(self._values[index.fqn], dtype) for index, dtype in dtypes.items()]
        self._coming = zip(dtypes, read_ahead(tensors), strict=True)
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        self._advance(self._given)
        index, values = next(self._coming)
        assert index == write_item.index, "DCP writes in the plan's order"
        self._given = values.nbytes
        return values
