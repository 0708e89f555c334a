"""Outliers among activations, layer by layer: of the residual stream, and of what every norm site reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.norms import NORMS
from models.transformer import Block
from pretrain.telemetry.sites import hooked
from pretrain.telemetry.statistics import Outliers, outliers


@contextmanager
def record_outliers(model: nn.Module) -> Iterator[dict[str, Outliers]]:
    """Record the stream at the end of every block and the input of every function that stands at a norm site.

    Yields a dict, name of the module -> Outliers, that the pass inside the ``with`` fills; of several the last stays.
    Nothing is read back to the host. It costs about ten passes over every tensor recorded, so that it grows with the
    tokens of the pass and not with those of a step.
    """
    found: dict[str, Outliers] = {}
    handles: list[RemovableHandle] = []
    functions = tuple(NORMS.values())
    for name, module in model.named_modules():
        if isinstance(module, Block):
            handles.append(module.register_forward_hook(_after(name, found)))
        elif isinstance(module, functions):
            handles.append(module.register_forward_pre_hook(_before(name, found)))
    with hooked(handles):
        yield found


def _before(name: str, found: dict[str, Outliers]) -> Any:
    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[name] = outliers(inputs[0])

    return record


def _after(name: str, found: dict[str, Outliers]) -> Any:
    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found[name] = outliers(output)

    return record
