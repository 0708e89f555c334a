"""What a person sees of a run: a progress bar in a terminal, plain lines in a log file. All on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pretrain.telemetry.metrics import Value


class RunConsole(Protocol):
    """What the loop says. Standard output stays free: its last line is a contract with scripts."""

    def message(self, text: str) -> None:
        """One line of text, above the bar."""

    def advance(self, step: int) -> None:
        """``step`` steps of the run are done."""

    def report(self, step: int, values: Mapping[str, Value]) -> None:
        """The values of a line of metrics.jsonl; those known here are shown, and stay until they change."""

    def close(self) -> None:
        """The run is over: leave the terminal as it was."""


def open_console(steps: int, start: int, rank: int, stream: TextIO | None = None) -> RunConsole:
    """The console of a run of ``steps`` steps that goes on after ``start`` of them.

    A bar if ``stream`` (null: standard error) is a terminal, else lines; silence on all ranks but 0.
    """
    if rank != 0:
        return _Silence()
    stream = sys.stderr if stream is None else stream
    if stream.isatty() and not Console(file=stream).is_dumb_terminal:
        return _Bar(steps, start, stream)
    return _Lines(steps, start, stream)


_FORMATS = {
    "loss": "loss {:.4f}",
    "val_loss": "val {:.4f}",
    "val_bits_per_byte": "({:.3f} bits/byte)",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.1%}",
}


class _Summary:
    """The last known values as one short text."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def update(self, values: Mapping[str, Value]) -> str:
        for key in _FORMATS:
            value = values.get(key)
            if isinstance(value, int | float):
                self._values[key] = value
        return "  ".join(text.format(self._values[key]) for key, text in _FORMATS.items() if key in self._values)


class _Bar:
    def __init__(self, steps: int, start: int, stream: TextIO) -> None:
        self._summary = _Summary()
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            redirect_stdout=False,
            refresh_per_second=2,  # the loop's process draws it
        )
        self._task = self._progress.add_task("", total=steps, completed=start)
        self._progress.start()

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def report(self, step: int, values: Mapping[str, Value]) -> None:
        self._progress.update(self._task, completed=step, description=self._summary.update(values))

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self, steps: int, start: int, stream: TextIO) -> None:
        self._summary = _Summary()
        self._steps, self._start, self._stream = steps, start, stream
        self._began = time.monotonic()

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def advance(self, step: int) -> None:
        pass

    def report(self, step: int, values: Mapping[str, Value]) -> None:
        elapsed = time.monotonic() - self._began
        line = f"step {step}/{self._steps}  {self._summary.update(values)}  elapsed {_clock(elapsed)}"
        if step > self._start:
            line += f"  left {_clock(elapsed * (self._steps - step) / (step - self._start))}"
        self.message(line)

    def close(self) -> None:
        pass


class _Silence:
    def message(self, text: str) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def report(self, step: int, values: Mapping[str, Value]) -> None:
        pass

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
