"""What rounding does to one run: the loss of every window under every treatment, of all linears and of some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from models import ConfigError
from pretrain.config import RunConfig
from tools.loading import TrainedRun
from tools.quantizing.formats import Treatment
from tools.quantizing.linears import HEAD, linears, place, rounded
from tools.quantizing.losses import Windows, window_losses
from tools.quantizing.signals import InputSignal, WeightSignal, input_signals, weight_signals
from tools.studies.statistics import Interval, interval

ALL = "all"
Part = tuple[int | str, str]  # (block, kind), either of them ALL


@dataclass(frozen=True)
class Question:
    """What is asked of every run."""

    treatments: Sequence[Treatment]  # the table's
    layers: Treatment | None  # of the table layer by layer
    head: bool  # whether the head is rounded too


@dataclass(frozen=True)
class Measured:
    """Losses in nats a token, one a window, in the windows' order."""

    name: str
    path: Path
    config: RunConfig
    step: int
    parameters: int
    windows: Windows
    losses: list[float]  # in fp32
    treated: Mapping[Treatment, list[float]]
    layers: Mapping[Part, list[float]]
    weights: list[WeightSignal]
    inputs: list[InputSignal]

    def change(self, losses: Sequence[float]) -> Interval:
        """The mean difference to fp32 over the windows."""
        return interval([after - before for after, before in zip(losses, self.losses, strict=True)])

    def change_against(self, other: Measured, treatment: Treatment) -> Interval:
        """How much more than ``other`` this one changes by ``treatment``; both on the same windows."""
        mine, theirs = (
            [after - before for after, before in zip(run.treated[treatment], run.losses, strict=True)]
            for run in (self, other)
        )
        return interval([a - b for a, b in zip(mine, theirs, strict=True)])

    def reads_like(self, other: Measured) -> bool:
        """Whether both were measured on the same windows, so that their changes can be paired."""
        return all(
            mine.shape == theirs.shape and bool((mine == theirs).all())
            for mine, theirs in zip(self.windows, other.windows, strict=True)
        )


def parts(names: Sequence[str]) -> dict[Part, list[str]]:
    """Which linears are rounded together: each alone, all of a block, all of a kind, all."""
    found: dict[Part, list[str]] = {}
    for name in names:
        block, kind = place(name)
        for part in ((block, kind), (block, ALL), (ALL, kind), (ALL, ALL)):
            found.setdefault(part, []).append(name)
    return found


def passes(trained: TrainedRun, question: Question) -> int:
    """How often every window goes through the model."""
    count = 1 + len(question.treatments)
    if question.layers is not None:
        count += len(parts(list(linears(trained.model)))) + 1
    return count


def measure(
    name: str,
    path: Path,
    trained: TrainedRun,
    windows: Windows,
    question: Question,
    advance: Callable[[], object],
) -> Measured:
    """``advance`` is called after every forward. ConfigError if the model's loss is not finite as it is."""
    names = list(linears(trained.model))

    def losses(treatment: Treatment, of: Sequence[str]) -> list[float]:
        with rounded(trained.model, dict.fromkeys(of, treatment)):
            return window_losses(trained, windows, advance)

    before = window_losses(trained, windows, advance)
    if not all(map(isfinite, before)):
        raise ConfigError(f"{path}: the validation loss of step {trained.step} is not finite; name a run that is sound")
    everything = [*names, HEAD] if question.head else names
    treated = {treatment: losses(treatment, everything) for treatment in question.treatments}
    layers: dict[Part, list[float]] = {}
    weights: list[WeightSignal] = []
    inputs: list[InputSignal] = []
    if question.layers is not None:
        layers = {part: losses(question.layers, of) for part, of in parts(names).items()}
        weights = weight_signals(trained, question.layers.format)
        inputs = input_signals(trained, windows, question.layers.format, advance)
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    return Measured(
        name, path, trained.config, trained.step, parameters, windows, before, treated, layers, weights, inputs
    )
