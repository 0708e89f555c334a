"""Folders of DeepSpeed: what ``save_checkpoint`` wrote under any ZeRO stage, and universal checkpoints both ways.

A universal checkpoint has a folder for each parameter with a file for the weight and one for each of its optimizer
state's tensors, under whatever names the optimizer gives them; DeepSpeed loads it under another world size too.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.errors import ConfigError
from pretrain.files import write_synced
from tools.formats import companions, zero
from tools.formats.config_json import model_config
from tools.formats.files import member, read_json, read_pickle
from tools.formats.lazy import LazyTensor, cast
from tools.formats.names import from_gpt2, from_llama
from tools.formats.single import write_torch
from tools.formats.weights import Weights, checked, run_config
from tools.formats.writing import Advance

_LATEST = ("latest", "latest_universal")
# DeepSpeed refuses a checkpoint without the version that made it; the layout is this one's.
_VERSION = "0.19.8"


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is one that save_checkpoint was given, or one that it made in that."""
    return any((path / name).is_file() for name in _LATEST) or any(path.glob("*_model_states.pt"))


def read(path: Path, allow_pickle: bool, with_optimizer: bool) -> Weights:
    """The weights, and the optimizer's state if asked for. config.yaml (of a run here) or config.json (of a model of
    transformers') beside them says what they are."""
    home, place = _places(path)
    if (place / "zero").is_dir():
        tensors, state, step = _read_universal(place, allow_pickle)
    else:
        tensors, state, step = zero.read(place, allow_pickle)
    own = companions.read(home)
    if own is not None:
        model = checked(own.config.model, tensors, place)
        return Weights(own.config, model, step, own.data, state if with_optimizer else None, own.tokenizer)
    if not (home / "config.json").is_file():
        raise ConfigError(f"{home} has no config.yaml: put the run's there, to say what the tensors are")
    if with_optimizer:
        raise ConfigError(f"{home}: optimizer state is kept for models with our own names only; leave --optimizer out")
    config = model_config(read_json(home / "config.json"), home)
    named = (from_gpt2 if config.trunk == "gpt" else from_llama)(tensors, config, place)
    return Weights(run_config(config), checked(config, named, place), tokenizer=companions.read_tokenizer(home))


def _places(path: Path) -> tuple[Path, Path]:
    """(the folder with the configuration, the checkpoint's own folder in it)."""
    for name in _LATEST:
        if (path / name).is_file():
            tag = (path / name).read_text(encoding="utf-8", errors="replace").strip()
            return path, member(path, tag, folder_in_it=True)
    has_config = any((path / name).is_file() for name in ("config.yaml", "config.json"))
    return (path if has_config else path.parent), path


def _read_universal(place: Path, allow_pickle: bool) -> tuple[dict[str, LazyTensor], dict[str, Any], int]:
    """(weights, optimizer state, step) of a universal checkpoint."""
    model: dict[str, LazyTensor] = {}
    state: dict[str, Any] = {}
    for folder in sorted((place / "zero").iterdir()):
        if not folder.is_dir():
            continue
        for file in sorted(member(place / "zero", folder.name, folder_in_it=True).glob("*.pt")):
            stored = read_pickle(member(folder, file.name), allow_pickle)
            value = stored.get("param") if isinstance(stored, dict) else stored
            if not isinstance(value, LazyTensor):
                raise ConfigError(f"{file} holds no tensor: only universal checkpoints of whole parameters are read")
            if file.stem == "fp32":
                model[folder.name] = value
            else:
                state[f"state.{folder.name}.{file.stem}"] = value
    path = member(place / "zero", "optimizer_state.pt")
    with zero.stand_ins():
        common = read_pickle(path, allow_pickle)
    state |= zero.group_values(common.get("param_groups", []), [])
    counts = read_pickle(next(place.glob("*_model_states.pt")), allow_pickle)
    return model, state, int(counts["global_steps"])


def write(weights: Weights, folder: Path, advance: Advance) -> list[str]:
    """A universal checkpoint; returns how it is loaded."""
    tag = f"global_step{weights.step}"
    place = folder / tag
    state = weights.optimizer or {}
    optimizer = weights.config.optimizer.name
    if state and optimizer in ("muon", "sgd-sai"):
        raise ConfigError(f"ZeRO's flat partitions know no state of optimizer {optimizer}: leave --optimizer out")
    for name, tensor in weights.model.items():
        home = place / "zero" / name
        home.mkdir(parents=True)
        _write_param(home / "fp32.pt", cast(tensor, torch.float32, name), advance)
        prefix = f"state.{name}."
        for key, value in state.items():
            if not key.startswith(prefix):
                continue
            kind = key.removeprefix(prefix)
            if kind == "step":
                _save(home / "step.pt", value.read())
            else:
                _write_param(home / f"{kind}.pt", value, advance)
    # Weights are loaded group by group, so that there must be as many groups as any optimizer may have.
    groups = _groups(state, list(weights.model)) or [{} for _ in weights.model]
    # Stage 3 looks in another place, and gives the settings of the first group there to all of them.
    alike = {key: value for key, value in groups[0].items() if all(group[key] == value for group in groups)}
    first = state.get(f"state.{next(iter(weights.model))}.step")
    step = first.read() if first is not None else torch.tensor(float(weights.step))
    common: dict[str, Any] = {"param_groups": groups, "ds_version": _VERSION}
    common["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": [alike]}
    _save(place / "zero" / "optimizer_state.pt", common)
    counts: dict[str, Any] = {
        "module": {},
        "param_shapes": [{name: torch.Size(tensor.shape) for name, tensor in weights.model.items()}],
        "lr_scheduler": None,
        "global_steps": weights.step,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": _VERSION,
    }
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        _save(place / name, counts)
    write_synced(folder / "latest_universal", tag.encode())
    companions.write(weights, folder)
    return ['load_checkpoint reads it under {"checkpoint": {"load_universal": true}}, ZeRO stage 1 to 3']


def _write_param(path: Path, tensor: LazyTensor, advance: Advance) -> None:
    write_torch(path, {"param": tensor}, advance)


def _save(path: Path, value: Any) -> None:
    content = io.BytesIO()
    torch.save(value, content)
    write_synced(path, content.getvalue())


def _groups(state: Mapping[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The optimizer's groups in its own order, of the settings that the state has for each parameter."""
    groups: list[dict[str, Any]] = []
    for name in names:
        prefix = f"param_groups.{name}."
        settings = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if settings and all(settings != {k: v for k, v in group.items() if k != "params"} for group in groups):
            groups.append({**settings, "params": []})
    for index, group in enumerate(groups):
        group["params"] = [index]
    return groups
