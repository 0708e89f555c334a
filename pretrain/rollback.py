"""When a run had better go back: a spike in what is logged that lasts; and how often it has."""

from __future__ import annotations

from collections import deque
from math import isfinite
from statistics import fmean, stdev
from typing import Any

from pretrain.config import RollbackConfig

_WINDOW = 32  # logged losses that a loss is compared with


class Rollbacks:
    """A pure function of what ``add`` and ``went_back`` were told, so that all ranks and a resumed run decide alike.

    A logged interval is bad if its loss is not finite or above mean + ``sigma`` · standard deviation of the last 32
    good ones (until there are as many, only the first counts), or if steps were left out in it. Everything is off
    with ``times`` 0.
    """

    def __init__(self, config: RollbackConfig) -> None:
        self._config = config
        self.done = 0  # times that the run has gone back
        self.passed_over = 0  # batches that it has done without
        self.good_step = 0  # the last logged step before the spike that is on, or before now
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._bad = 0  # intervals in a row
        self._left_out = 0

    @property
    def are_on(self) -> bool:
        return self._config.times > 0

    @property
    def is_allowed(self) -> bool:
        """Whether the run may go back once more."""
        return self.done < self._config.times

    @property
    def spikes(self) -> bool:
        return self._bad > 0

    @property
    def lasts(self) -> bool:
        """Whether the spike has lasted so long that the run had better go back."""
        return self._bad >= self._config.after

    def add(self, step: int, loss: float, left_out: int) -> None:
        """What is logged at ``step``; ``left_out``: steps left out since the run began."""
        if not self.are_on:
            return
        bad = not isfinite(loss) or left_out > self._left_out
        if not bad and len(self._losses) == _WINDOW:
            bad = loss > fmean(self._losses) + self._config.sigma * stdev(self._losses)
        self._left_out = left_out
        self._bad = self._bad + 1 if bad else 0
        if not bad:
            self._losses.append(loss)
            self.good_step = step

    def went_back(self, batches: int, state: dict[str, Any] | None) -> None:
        """Past so many batches, to the checkpoint that has ``state``; None: one that was not made by a run."""
        done, passed_over = self.done + 1, self.passed_over + batches
        self.load_state(Rollbacks(self._config).state() if state is None else state)
        self.done, self.passed_over = done, passed_over

    def state(self) -> dict[str, Any]:
        """As JSON can write it."""
        return {
            "done": self.done,
            "passed_over": self.passed_over,
            "good_step": self.good_step,
            "losses": list(self._losses),
            "bad": self._bad,
            "left_out": self._left_out,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.done, self.passed_over, self.good_step = state["done"], state["passed_over"], state["good_step"]
        self._losses = deque(state["losses"], maxlen=_WINDOW)
        self._bad, self._left_out = state["bad"], state["left_out"]
