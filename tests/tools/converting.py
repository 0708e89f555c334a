"""A run's folder with chosen weights, and conversions of it inside the test's own process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from models import ModelConfig, Transformer, parameter_roles
from pretrain.checkpoint import Checkpointer, rng_state
from pretrain.cli import dump
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.optimizers import build_optimizer
from tests.models.building import scrambled
from tests.runs import checkpoint_tensors
from tools import convert
from tools.formats.weights import run_config


def write_run(
    folder: Path,
    model: ModelConfig,
    *,
    step: int = 7,
    seed: int = 0,
    tokenizer: bytes | None = None,
    optimizer: tuple[OptimizerConfig, Mapping[str, Any]] | None = None,
) -> Transformer:
    """Commits a checkpoint of a model whose every parameter is random, as the trainer would; returns the model."""
    weights = scrambled(model, seed)
    config: RunConfig = replace(run_config(model), name=folder.name, runs_dir=str(folder.parent))
    parts: dict[str, Any] = {"model": weights.state_dict()}
    if optimizer is not None:
        config = replace(config, optimizer=optimizer[0])
        parts["optimizer"] = dict(optimizer[1])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    extras = {"data": {"prepared": "of some text"}}
    Checkpointer(folder / "checkpoints", keep=1, keep_every=None).save(step, parts, extras, rng_state())
    return weights


def stepped(model: nn.Module, config: OptimizerConfig) -> dict[str, Any]:
    """The state after a step of random gradients, as the engine hands it to a checkpoint."""
    optimizer = build_optimizer(dict(model.named_parameters()), parameter_roles(model), config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))


def run_convert(source: Path, destination: Path, target: str, *arguments: str) -> Path:
    """``python -m tools.convert``, with its errors as exceptions; returns the destination."""
    convert.main([str(source), str(destination), "--to", target, *arguments])
    return destination


def tensors_of(run: Path) -> dict[str, Tensor]:
    """All tensors of the only checkpoint of a run, read without knowing the model."""
    (checkpoint,) = (run / "checkpoints").iterdir()
    found = checkpoint_tensors(checkpoint)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def model_of(run: Path) -> dict[str, Tensor]:
    """The weights among them, by the model's own names."""
    return {n.removeprefix("model."): t for n, t in tensors_of(run).items() if n.startswith("model.")}


def assert_bitwise(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """The same names, shapes, dtypes and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
        same = tensor.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))
        assert same, name
