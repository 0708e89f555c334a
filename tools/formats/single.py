"""One file with our names: torch.save of a plain state dict, or safetensors (in shards if it grows too large).

The folder also has ``config.yaml`` and what else a run needs (companions.py), and with ``--optimizer`` a second file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from models.errors import ConfigError
from tools.formats import companions
from tools.formats.files import read_indexed, read_pickle, read_safetensors, state_dict
from tools.formats.lazy import LazyTensor, memory_of
from tools.formats.weights import Weights, checked, rounded
from tools.formats.writing import Advance, write_all, write_safetensors, write_sharded

_TORCH, _SAFETENSORS = "model.pt", "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PLAIN = "plain_values"  # in the metadata of optimizer.safetensors


def holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_SAFETENSORS, _INDEX, _TORCH))


def read(path: Path, allow_pickle: bool, with_optimizer: bool) -> Weights:
    """The folder, or the file in it."""
    folder = path if path.is_dir() else path.parent
    own = companions.read(folder)
    if own is None:
        raise ConfigError(f"{folder} has no config.yaml: put the run's there, to say what the tensors are")
    if path.is_dir():
        path = next(folder / name for name in (_INDEX, _SAFETENSORS, _TORCH) if (folder / name).is_file())
    is_torch = is_archive(path)
    if is_torch:
        tensors = state_dict(read_pickle(path, allow_pickle), path)
    elif path.name == _INDEX:
        tensors = read_indexed(folder, path, read_safetensors)
    else:
        tensors = read_safetensors(path)
    state = _read_optimizer(folder, is_torch, allow_pickle) if with_optimizer else None
    model = checked(own.config.model, tensors, path)
    return Weights(own.config, model, own.step, own.data, state, own.tokenizer)


def is_archive(path: Path) -> bool:
    """Whether torch.save wrote the file: a zip archive, or a pickle in the format before that."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def write(
    weights: Weights, folder: Path, is_torch: bool, dtype: torch.dtype | None, shard_size: int, advance: Advance
) -> None:
    """``model.pt`` or ``model.safetensors``, ``optimizer.*`` if there is optimizer state, and the companions."""
    tensors = rounded(weights, dtype)
    if is_torch:
        write_torch(folder / _TORCH, tensors, advance)
    else:
        write_sharded(folder, tensors, shard_size, advance)
    state = weights.optimizer
    if state is not None and is_torch:
        write_torch(folder / "optimizer.pt", state, advance)
    elif state is not None:
        learned = {key: value for key, value in state.items() if isinstance(value, LazyTensor)}
        plain = json.dumps({key: _to_json(value) for key, value in state.items() if key not in learned})
        write_safetensors(folder / "optimizer.safetensors", learned, advance, {_PLAIN: plain})
    companions.write(weights, folder)


def _read_optimizer(folder: Path, is_torch: bool, allow_pickle: bool) -> dict[str, Any]:
    path = folder / ("optimizer.pt" if is_torch else "optimizer.safetensors")
    if not path.is_file():
        raise ConfigError(f"{folder} holds no optimizer state: leave --optimizer out")
    if is_torch:
        state = read_pickle(path, allow_pickle)
        if isinstance(state, dict):
            return state
    else:
        tensors = read_safetensors(path)
        with safe_open(path, framework="pt") as file:
            plain = (file.metadata() or {}).get(_PLAIN)
        try:
            values = {key: _from_json(value) for key, value in json.loads(plain or "").items()}
        except (ValueError, AttributeError, KeyError, TypeError):
            values = {}
        if values:
            return {**tensors, **values}
    raise ConfigError(f"{path} is no optimizer state of ours: leave --optimizer out")


def _to_json(value: Any) -> Any:
    return {"tuple": list(value)} if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    return tuple(value["tuple"]) if isinstance(value, dict) else value


def write_torch(path: Path, values: dict[str, Any], advance: Advance) -> None:
    """What ``torch.save`` of the dictionary gives, tensor by tensor: first with gaps for their values, then those."""
    with FakeTensorMode():
        outlines = {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, LazyTensor) else value
            for name, value in values.items()
        }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(outlines, path)
        gaps = torch.load(path, weights_only=True)
    with path.open("r+b", buffering=0) as file:
        for name, value in values.items():
            if isinstance(value, LazyTensor) and value.bytes:
                file.seek(gaps[name].untyped_storage()._checkpoint_offset)
                write_all(file.fileno(), memory_of(value.read()), advance)
        os.fsync(file.fileno())
