"""What every format is read into and written from: weights under their canonical names, and what goes along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models import ModelConfig, Transformer, parameter_roles
from models.errors import ConfigError
from pretrain.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from tools.formats.lazy import LazyTensor, cast

# Gains, alphas and the like stay in fp32 wherever the format is ours: in bf16 an alpha is off by up to 0.4 %.
_ROUNDED_ROLES = ("embedding", "head", "matrix", "bias")
_LONGEST_SEQUENCE = 1024  # tokens, for the configuration of a model that was not trained here
_SEQUENCES = 8


@dataclass(frozen=True)
class Weights:
    """``model``: canonical name -> tensor, in the model's order, exactly the parameters of ``config.model``.

    ``data``: where a prepared or streamed source goes on, empty if unknown. ``optimizer``: its state as a checkpoint
    has it, ``state.NAME.KEY`` -> tensor and ``param_groups.NAME.KEY`` -> plain value; None if there is none or it was
    not asked for. ``tokenizer``: file name -> content. ``notes``: what the user should know of the import.
    """

    config: RunConfig
    model: dict[str, LazyTensor]
    step: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    tokenizer: dict[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape, in the model's order."""
    return {name: tuple(parameter.shape) for name, parameter in on_meta(config).named_parameters()}


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def checked(config: ModelConfig, tensors: Mapping[str, LazyTensor], where: Path) -> dict[str, LazyTensor]:
    """``tensors`` in the model's order. ConfigError if one is missing, is too many, or has another shape or kind."""
    shapes = parameter_shapes(config)
    complain_of(shapes.keys() - tensors.keys(), f"{where} lacks", "it is not complete, get it again")
    complain_of(tensors.keys() - shapes.keys(), f"{where} also has", "its configuration describes another model")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ConfigError(
                f"{where}: {name} has the shape {tensors[name].shape}, its configuration makes it {shape}: "
                "they belong to different models"
            )
        if not tensors[name].dtype.is_floating_point:
            raise ConfigError(f"{where}: {name} holds {tensors[name].dtype}, not floating-point numbers")
    return {name: tensors[name] for name in shapes}


def complain_of(names: Iterable[str], problem: str, remedy: str) -> None:
    """ConfigError if there are any names."""
    found = sorted(names)
    if found:
        rest = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ConfigError(f"{problem} {found[0]}{rest}: {remedy}")


def rounded(weights: Weights, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """The model's tensors with the matrices, embeddings and biases in ``dtype``; None leaves all as they are."""
    if dtype is None:
        return weights.model
    roles = parameter_roles(on_meta(weights.config.model))
    return {
        name: cast(tensor, dtype, name) if roles[name] in _ROUNDED_ROLES else tensor
        for name, tensor in weights.model.items()
    }


def run_config(model: ModelConfig) -> RunConfig:
    """A run that goes on with a model which was not trained here. How long, and on what, is the user's to write."""
    length = min(model.context, _LONGEST_SEQUENCE)
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=length),
        train=TrainConfig(steps=1000, batch_tokens=_SEQUENCES * length),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4),
    )
