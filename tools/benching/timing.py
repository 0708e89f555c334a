"""Turns: what is compared runs in one process, alternately, so that what else the machine does falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from tools.progress import counting

Result = TypeVar("Result")


class Spread(NamedTuple):
    """Of the rounds' values: the least, the quartiles (linear interpolation), the greatest."""

    low: float
    first: float
    median: float
    third: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*np.percentile(np.asarray(values, np.float64), (0, 25, 50, 75, 100)).tolist())


def alternate(names: Sequence[str], turn: Callable[[int, bool], Result], rounds: int) -> list[list[Result]]:
    """The results of ``turn(place, warming)`` of every name, by place and round.

    A first round, in which ``warming`` is true, counts for nothing. Every second round goes through the names
    backwards: a machine that grows slower or faster all along favours none.
    """
    found: list[list[Result]] = [[] for _ in names]
    with counting() as progress:
        task = progress.add_task("", total=len(names) * (rounds + 1))
        for number in range(rounds + 1):
            stage = f"round {number} of {rounds}" if number else "warming up"
            places = range(len(names))
            for place in reversed(places) if number % 2 else places:
                progress.update(task, description=f"{stage}: {names[place]}")
                result = turn(place, number == 0)
                if number:
                    found[place].append(result)
                progress.advance(task)
    return found


def wait(device: torch.device) -> None:
    """Until what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeated(work: Callable[[], object], times: int) -> Callable[[], None]:
    """``work``, so many times."""

    def all_of_it() -> None:
        for _ in range(times):
            work()

    return all_of_it


def timed(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds from an idle device to an idle device."""
    if device is not None:
        wait(device)
    began = time.perf_counter()
    work()
    if device is not None:
        wait(device)
    return time.perf_counter() - began
