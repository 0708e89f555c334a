"""Output that is there whole or not at all, with a progress bar on the way."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from models.errors import ConfigError
from pretrain.files import locked, sync_folder, write_synced
from tools.formats.lazy import LazyTensor, StoredTensor, memory_of

Advance = Callable[[int], None]  # takes the bytes that were written since the last call

_PORTION = 1 << 20  # values read or bytes written at once; Linux takes far larger ones in twice the time
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@contextmanager
def aside(destination: Path) -> Iterator[Path]:
    """A new folder that becomes ``destination`` at the end of the block, and is gone after any exception.

    What a killed conversion to the same place left is swept. ConfigError if the destination exists, or if another
    process writes to it now.
    """
    if destination.exists() or destination.is_symlink():
        raise ConfigError(f"{destination} exists: name another destination, or remove it first")
    partial = destination.with_name(f".{destination.name}.partial")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    with locked(partial, busy=f"another process is writing {destination}: wait for it"):
        try:
            for entry in partial.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield partial
            sync_folder(partial)
            partial.rename(destination)
            sync_folder(destination.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Advance]:
    """A bar on standard error over ``total`` bytes."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def require_space(folder: Path, wanted: int) -> None:
    """ConfigError if the disk that ``folder`` is on has not so many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ConfigError(
            f"no space in {folder.parent}: the result takes {wanted / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        )


def parse_size(text: str) -> int:
    """Bytes in ``5GB``, ``300MB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"--shard-size is {text!r}: write a size such as 5GB or 300MB")
    return size


def read_ahead(tensors: Iterable[tuple[LazyTensor, torch.dtype]]) -> Iterator[Tensor]:
    """The tensors in order, each in a dtype that holds its values exactly, and valid until the next is asked for.

    A thread reads the next one meanwhile, into the memory of the one before.
    """
    with ThreadPoolExecutor(1, "reader") as reader:
        before: Future[Tensor] | None = None
        for (tensor, dtype), memory in zip(tensors, cycle((_Memory(), _Memory())), strict=False):
            coming = reader.submit(memory.fill, tensor, dtype)
            if before is not None:
                yield before.result()
            before = coming
        if before is not None:
            yield before.result()


class _Memory:
    """Holds one tensor after the other: new pages for each would take as long again as reading it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def fill(self, tensor: LazyTensor, dtype: torch.dtype) -> Tensor:
        assert torch.promote_types(tensor.dtype, dtype) == dtype, "what rounds is for lazy.cast"
        count = math.prod(tensor.shape)
        if len(self._bytes) < count * dtype.itemsize:
            self._bytes = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        flat = torch.empty(0, dtype=dtype)
        if count:
            flat = torch.frombuffer(memory_of(self._bytes), dtype=dtype, count=count)
        if isinstance(tensor, StoredTensor):
            for begin in range(0, count, _PORTION):
                portion = flat[begin : begin + _PORTION]
                portion.copy_(tensor.part(begin, len(portion)))
        else:
            flat.copy_(tensor.read().view(-1))
        return flat.view(tensor.shape)


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], advance: Advance, metadata: Mapping[str, str] | None = None
) -> None:
    """One safetensors file, tensor by tensor: the library's own writer wants all of them in memory."""
    # Wider ones first keeps every tensor aligned to its own width, as the library does.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.bytes
        kind = _DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in read_ahead((tensors[name], tensors[name].dtype) for name in order):
            write_all(file.fileno(), memory_of(values), advance)
        os.fsync(file.fileno())


def write_all(descriptor: int, content: memoryview, advance: Advance) -> None:
    """All of ``content`` at the descriptor's place, in portions that keep a progress bar moving."""
    while content.nbytes:
        count = os.write(descriptor, content[:_PORTION])
        advance(count)
        content = content[count:]


def write_sharded(folder: Path, tensors: Mapping[str, LazyTensor], shard_size: int, advance: Advance) -> None:
    """``model.safetensors``, or shards of at most ``shard_size`` bytes (or one tensor) and their index."""
    shards: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.bytes for t in shards[-1].values()) + tensor.bytes > shard_size:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors, advance)
        return
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        write_safetensors(folder / file, shard, advance)
    index = {
        "metadata": {"total_size": sum(tensor.bytes for tensor in tensors.values())},
        "weight_map": {name: file for file, shard in files.items() for name in shard},
    }
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: object) -> None:
    write_synced(path, json.dumps(value, indent=2).encode() + b"\n")
