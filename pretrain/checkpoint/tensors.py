"""Tensors and plain values through torch.distributed.checkpoint (DCP), made strict.

DCP writes each rank's shards to one file and a map of them to ``.metadata``, and reads any part of any tensor back
under any sharding. As it comes, four things are amiss for us, and are mended here:

- It unpickles without restriction, both ``.metadata`` and plain values. Here the first is limited to DCP's own
  record types, the second to ``torch.load(weights_only=True)``.
- It loads into another dtype by casting and reports a different shape by a traceback of every rank. Here names, shapes
  and dtypes are compared before a byte is read.
- What stops its writer, a full disk or a signal, it hides behind "unexpected pos". Here the cause is what is raised.
- It keeps no checksums. Here they are taken of what is written while it is written.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config

from models.errors import ConfigError
from pretrain.checkpoint.manifest import FileRecord, RecordedFile

# A single process is fine. Once and for all: warnings.catch_warnings would not be safe in a thread beside the training.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def save_tensors(path: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, FileRecord]:
    """Collective. Writes and syncs this rank's shards as ``__RANK_0.distcp``; rank 0 writes ``.metadata`` too.

    Returns the records of this rank's files by name.
    """
    writer = Writer(path)
    save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    return writer.records


def read_metadata(path: Path) -> Metadata:
    """DCP's map of the tensors of a checkpoint: names, shapes, dtypes, and where each shard lies."""
    with (path / ".metadata").open("rb") as file:
        metadata: Metadata = _MetadataUnpickler(file).load()
    return metadata


def load_tensors(path: Path, metadata: Metadata, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Collective. Fills ``tensors`` in place with the parts it names; others in the checkpoint are left alone.

    Raises ConfigError, before anything is written to, if a name, shape or dtype differs (wrapped by DCP in a
    CheckpointException that `Ranks.together` opens).
    """
    load(
        tensors,
        storage_reader=_Reader(path, metadata),
        planner=_Planner(path),
        process_group=group,
        no_dist=group is None,
    )


def bytes_of(tensors: object) -> int:
    """Bytes of all tensors in nested dictionaries, of a DTensor as a whole: about what their checkpoint takes."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(bytes_of, tensors.values())) if isinstance(tensors, dict) else 0


class Writer(FileSystemWriter):
    """DCP's storage writer, for one file a rank in the new folder ``path``. ``records``: of the files that this process
    has written there, by name. It raises what stopped it: OSError, or what a signal's handler raised."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            single_file_per_rank=True,
            sync_files=True,
            thread_count=1,  # with more, DCP loses an exception raised in any but the first
            per_thread_copy_ahead=0,  # else DCP waits for a GPU, the first of the node where a thread of ours calls it
            overwrite=False,
        )
        self.fs = _RecordingFileSystem()
        self.records = self.fs.records

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            # No reader of torch's looks at the CRC-32 in its archives, and the records have SHA-256.
            with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
                return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError | KeyboardInterrupt | SystemExit):
                cause = cause.__context__
            raise cause or error from None


class _RecordingFileSystem(FileSystem):
    """``records``: of the files written through it, by name."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", "only a writer has it"
        with RecordedFile(Path(path)) as file:
            yield file
            if not file.closed:  # DCP has synced its map before all of it left the buffer
                file.flush()
                os.fsync(file.fileno())
        self.records[Path(path).name] = file.record

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _Reader(FileSystemReader):
    """Is given the metadata: DCP would treat a rank that fails to read it as one with metadata of its own, and that
    rank would leave the collectives that the others wait in."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Builds DCP's records and nothing else."""

    _RECORDS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _VALUES = (torch.Size, pathlib.PosixPath, pathlib.WindowsPath, torch.serialization._get_layout)

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("torch", "pathlib") and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, torch.dtype) or found in self._VALUES:
                return found
            is_record = is_dataclass(found) or (isinstance(found, type) and issubclass(found, Enum))
            if is_record and found.__module__ in self._RECORDS:
                return found
        raise ConfigError(
            f".metadata of the checkpoint asks for {module}.{name}, which no checkpoint needs: do not trust its source"
        )


class _Planner(DefaultLoadPlanner):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        self._refuse_another_architecture(self.metadata)
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        *path, last = self.mappings[read_item.dest_index.fqn]
        target: Any = self.original_state_dict
        for key in path:
            target = target[key]
        target[last] = torch.load(value, weights_only=True)

    def _refuse_another_architecture(self, metadata: Metadata) -> None:
        paths = metadata.planner_data | self.mappings  # flat name -> path; the path begins with the part
        here = {name: _describe(value) for name, value in self.state_dict.items()}
        there = {
            name: _describe(value)
            for name, value in metadata.state_dict_metadata.items()
            if paths[name][0] in self.original_state_dict
        }
        differing = [name for name in here | there if here.get(name) != there.get(name)]
        if not differing:
            return
        # A model that differs drags its optimizer state along, so the model is the one to name.
        name = min(differing, key=lambda name: paths[name][0] != "model")
        part = paths[name][0]
        raise ConfigError(
            f"checkpoint {self.path} belongs to another {'architecture' if part == 'model' else part}: "
            f"{'.'.join(map(str, paths[name][1:]))} is {there.get(name, 'absent')} in the checkpoint and "
            f"{here.get(name, 'absent')} in this run ({len(differing)} of {len(here | there)} entries differ): "
            f"write another --name, or the {part} section that the checkpoint was made with"
        )


def _describe(value: object) -> str:
    """Shape and dtype of a tensor, or of DCP's record of one."""
    if isinstance(value, TensorStorageMetadata):
        return f"{tuple(value.size)} {value.properties.dtype}"
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return "a plain value"
