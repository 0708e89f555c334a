"""metrics.jsonl: one JSON object a logged step; and the same scalars for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Value = float | int | str | None


class MetricsWriter:
    """Appends to ``folder/metrics.jsonl`` and, if asked, to ``folder/tensorboard/``. For rank 0 alone.

    ``resume_step`` is the number of steps that the loaded checkpoint has behind it, 0 for a run that starts. On
    opening, every line of a later step goes (at 0: every line), and so does a last line that a kill tore: the file
    is then the one that an uninterrupted run would have, provided that the line of a step is written before the
    step's checkpoint is committed. The rewrite is atomic. TensorBoard is told to hide the same steps.

    Raises:
        ConfigError: TensorBoard is asked for and not installed, or a line before the last is no JSON.
    """

    def __init__(self, folder: Path, tensorboard: bool, resume_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._board = _summary_writer(folder / "tensorboard", resume_step) if tensorboard else None
        path = folder / "metrics.jsonl"
        _drop_lines_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append ``{"step": step, **values}`` as one line, at once visible to other processes.

        JSON has no NaN and no infinity: they become null, which every reader plots as a gap. TensorBoard gets the
        numbers as they are, and neither strings nor None.
        """
        line = {"step": step} | {key: _finite(value) for key, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not isfinite(value) else value


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # torn: a whole line ends in a newline, which is written last
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            done = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} line {number} is no metrics line: repair it or remove it") from None
        if 0 < done <= step or done == 0 < step:
            kept.append(line)
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _summary_writer(folder: Path, resume_step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "log.tensorboard is true, but the package tensorboard is not installed: "
            "pip install tensorboard, or set log.tensorboard to false"
        ) from None
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)
