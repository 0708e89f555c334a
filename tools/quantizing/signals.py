"""How much of a linear's weight and input is left after rounding, and the outliers that decide about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from math import inf, log10, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.telemetry.statistics import outliers
from tools.loading import TrainedRun
from tools.quantizing.formats import FORMATS, fake_quantize
from tools.quantizing.linears import effective_weight, linears, place
from tools.quantizing.losses import Windows, window_losses

_SHARING = (("q", "k", "v"), ("out",), ("gate", "up"), ("down",))  # kinds of linears that read the same


class Ratio(NamedTuple):
    """Signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum (x - rounded x)^2), in dB."""

    per_tensor: float
    per_row: float


class WeightSignal(NamedTuple):
    block: int
    kind: str
    ratio: Ratio


class InputSignal(NamedTuple):
    """Of what linears read; the last three are means over windows (pretrain/telemetry/statistics.py)."""

    block: int
    kinds: str  # that read it: "q, k, v"
    ratio: Ratio
    over: float  # features with a magnitude above 6
    kurtosis: float
    largest: float  # magnitude, over the median one


def decibels(signal: float, noise: float) -> float:
    """inf where nothing is lost, NaN where nothing was there."""
    if signal == 0:
        return nan
    return inf if noise == 0 else 10 * log10(signal / noise)


def weight_signals(trained: TrainedRun, format: str) -> list[WeightSignal]:
    """Of every linear of the blocks, in the model's order."""
    return [
        WeightSignal(*place(name), _ratio(_powers(effective_weight(linear), format)))
        for name, linear in linears(trained.model).items()
    ]


def input_signals(
    trained: TrainedRun, windows: Windows, format: str, advance: Callable[[], object]
) -> list[InputSignal]:
    """Of what the blocks' linears read in these windows, in the model's order. One forward a window."""
    own = linears(trained.model)
    powers: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    shapes: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    with ExitStack() as hooks:
        for name, linear in own.items():
            block, kind = place(name)
            readers = next(group for group in _SHARING if kind in group)
            if kind != readers[-1]:
                continue
            there = [reader for reader in readers if name.removesuffix(kind) + reader in own]

            def see(_: Any, given: tuple[Tensor], key: tuple[int, str] = (block, ", ".join(there))) -> None:
                powers[key].append(_powers(given[0], format))
                shapes[key].append(torch.stack(outliers(given[0])))

            hooks.callback(linear.register_forward_pre_hook(see).remove)
        window_losses(trained, windows, advance)
    return [
        InputSignal(*key, _ratio(torch.stack(found).sum(0)), *torch.stack(shapes[key]).mean(0).tolist())
        for key, found in powers.items()
    ]


@torch.no_grad()
def _powers(x: Tensor, format: str) -> Tensor:
    """fp64 [3]: of the signal, of the noise per tensor, of the noise per row."""
    noises = [x - fake_quantize(x, FORMATS[format], per_row) for per_row in (False, True)]
    return torch.stack([part.double().square().sum() for part in (x, *noises)])


def _ratio(powers: Tensor) -> Ratio:
    signal, per_tensor, per_row = powers.tolist()
    return Ratio(decibels(signal, per_tensor), decibels(signal, per_row))
