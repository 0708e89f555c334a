"""Tensor files that other people wrote: safetensors and torch's, one or many under an index.

Nothing in them is run, and nothing outside their folder is read.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.errors import ConfigError
from tools.formats.lazy import LazyTensor, in_file

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ConfigError for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is no JSON object: get it again")
    return value


def member(folder: Path, name: object, *, folder_in_it: bool = False) -> Path:
    """The file ``name`` of ``folder``, or the folder. ConfigError if it is not in it, by its name or by a link."""
    if not isinstance(name, str) or not name or Path(name).name != name or name in (".", ".."):
        raise ConfigError(f"{folder}: its index names the file {name!r}: only names of files beside it are read")
    path, home = folder / name, folder.resolve()
    if not (path.is_dir() if folder_in_it else path.is_file()):
        raise ConfigError(f"{folder} lacks {name}: it is not complete, get it again")
    # The cache of the Hugging Face hub links snapshots/REVISION/FILE to blobs/HASH.
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.resolve().parent not in homes:
        raise ConfigError(f"{path} is a link to outside of its folder: copy the file there if you trust it")
    return path


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file. ConfigError if it is damaged: cut off, overlapping, or not one at all."""
    try:
        with safe_open(path, framework="pt"):  # checks every offset against shapes, neighbours and the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is no whole safetensors file ({_short(error)}): get it again") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    tensors: dict[str, LazyTensor] = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ConfigError(f"{path}: {name} holds {entry['dtype']}: only floating-point weights can be converted")
        tensors[name] = in_file(path, 8 + size + entry["data_offsets"][0], entry["shape"], _DTYPES[entry["dtype"]])
    return tensors


def read_pickle(path: Path, allow_pickle: bool) -> Any:
    """What torch.save wrote, with a LazyTensor for each tensor. ConfigError unless the user allows pickles; even then
    nothing is built but tensors and plain containers."""
    if not allow_pickle:
        raise ConfigError(
            f"{path} is a pickle, a format in which programs can hide: convert it to safetensors where it was made, or "
            "add --allow-pickle if you trust its source (it is then read with weights_only=True)"
        )
    try:
        with FakeTensorMode(), warnings.catch_warnings():  # offsets into the file in place of values
            warnings.simplefilter("ignore")
            stored = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        raise ConfigError(f"{path} is not read: {_short(error)}") from None
    return _lazily(stored, path)


def _lazily(value: Any, path: Path) -> Any:
    if isinstance(value, Tensor):
        return in_archive(value, path)
    if isinstance(value, Mapping):
        return {key: _lazily(inner, path) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_lazily(inner, path) for inner in value)
    return value


def in_archive(fake: Tensor, path: Path, start: int = 0) -> LazyTensor:
    """The tensor that torch.load made under FakeTensorMode of what torch.save wrote from byte ``start`` of ``path``."""
    offset = getattr(fake.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise ConfigError(f"{path} is in torch's format of before 2020: load it and save it again with torch.save")
    if not fake.numel():
        shape, kind = tuple(fake.shape), fake.dtype
        return LazyTensor(shape, kind, lambda: torch.empty(shape, dtype=kind))
    # A view, e.g. a transposed matrix, is laid out again when it is read.
    first, strides = fake.storage_offset(), fake.stride()
    offset += start
    if fake.is_contiguous():
        return in_file(path, offset + first * fake.dtype.itemsize, fake.shape, fake.dtype)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(fake.shape, strides, strict=True))
    stored = in_file(path, offset + first * fake.dtype.itemsize, (extent,), fake.dtype)
    shape = tuple(fake.shape)
    return LazyTensor(shape, fake.dtype, lambda: stored.read().as_strided(shape, strides).contiguous())


def state_dict(value: Any, path: Path) -> dict[str, LazyTensor]:
    """``value`` if it is a plain dictionary of tensors."""
    if not isinstance(value, dict) or not all(isinstance(t, LazyTensor) for t in value.values()):
        raise ConfigError(f"{path} is no state dict, names and tensors alone: save model.state_dict()")
    return value


def read_indexed(folder: Path, index: Path, reader: Callable[[Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """The tensors of all shards that an index names, which are to be exactly those it says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map: get it again")
    files: dict[Any, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file if isinstance(file, str) else repr(file), set()).add(name)
    paths = {file: member(folder, file) for file in files}
    tensors: dict[str, LazyTensor] = {}
    for file, names in files.items():
        shard = reader(paths[file])
        differing = sorted(names ^ shard.keys())
        if differing:
            where = "lacks" if differing[0] in names else "also has"
            raise ConfigError(f"{folder / file} {where} {differing[0]}, other than {index.name} says: get both again")
        tensors |= shard
    return tensors


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
