"""Optimizer state as a checkpoint holds it: ``state.NAME.KEY`` -> tensor, ``param_groups.NAME.KEY`` -> plain value."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models import parameter_roles
from models.errors import ConfigError
from pretrain.config import RunConfig
from pretrain.optimizers import build_optimizer
from tools.formats.lazy import LazyTensor, filled
from tools.formats.weights import on_meta, parameter_shapes


def fresh(config: RunConfig) -> dict[str, Any]:
    """The state before the first step, under whatever names the optimizer gives it."""
    # One element stands for each parameter, in as many dimensions (Muon's are matrices): a step of gradient 0 at
    # learning rate 0 makes its state and moves nothing.
    shapes = parameter_shapes(config.model)
    stand_ins = {name: nn.Parameter(torch.zeros([1] * len(shape))) for name, shape in shapes.items()}
    optimizer = build_optimizer(stand_ins, parameter_roles(on_meta(config.model)), config.optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in stand_ins.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    flat: dict[str, Any] = {}
    for name, shape in shapes.items():
        for key, value in optimizer.state[stand_ins[name]].items():
            flat[f"state.{name}.{key}"] = filled(0.0, shape if value.dim() else (), value.dtype)  # a count, a scale: []
        flat |= {f"param_groups.{name}.{key}": value for key, value in groups[name].items() if key != "params"}
    return flat


def check(state: dict[str, Any], config: RunConfig) -> None:
    """ConfigError unless ``state`` is one of ``config``'s optimizer for ``config``'s model."""
    expected = fresh(config)
    for key in expected.keys() ^ state.keys():
        here = "lacks" if key in expected else "also has"
        raise ConfigError(
            f"the optimizer state {here} {key}, as optimizer.name {config.optimizer.name} does not: write the "
            "--optimizer.KEY values it was made with, or leave --optimizer out for a fresh state"
        )
    for key, value in expected.items():
        if isinstance(value, LazyTensor) and (value.shape, value.dtype) != (state[key].shape, state[key].dtype):
            raise ConfigError(
                f"the optimizer state {key} is {state[key].shape} {state[key].dtype}, not {value.shape} {value.dtype}: "
                "write the --optimizer.KEY values it was made with, or leave --optimizer out for a fresh state"
            )


def learned(state: dict[str, Any] | None) -> dict[str, LazyTensor]:
    """The tensors of a state."""
    return {key: value for key, value in (state or {}).items() if isinstance(value, LazyTensor)}
