"""What became of a cell, as its run's folder tells: whoever started it, on whichever machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

from models.errors import ConfigError
from pretrain.cli import flatten
from pretrain.config import RunConfig
from pretrain.files import write_atomically
from pretrain.launched import OUTCOME
from pretrain.run import RunFolder
from tools.studies.grid import Cell, StopEarly, Study

LAUNCHES = "launches"  # in a run's folder, one for each time that it was started
HOPELESS = "hopeless.json"  # in a run's folder: why it was asked to stop early
FINISHED, DIVERGED, STOPPED = 0, 3, 75  # exit codes of a run

State = Literal["finished", "diverged", "stopped early", "unfinished"]


@dataclass(frozen=True)
class Result:
    """``loss`` and ``bits_per_byte``: of the last validation, of a finished cell only. ``config``: as the run resolved
    it, once it began."""

    cell: Cell
    state: State
    config: RunConfig
    loss: float | None = None
    bits_per_byte: float | None = None
    note: str = ""

    @property
    def is_over(self) -> bool:
        return self.state != "unfinished"

    @property
    def score(self) -> float:
        """What a cell counts in tuning. Whatever did not finish is worse than whatever did."""
        return inf if self.loss is None else self.loss


def look(cell: Cell, rule: StopEarly | None) -> Result:
    """The state of ``cell``. A cell that was stopped by another rule than this one may go on."""
    config = _resolved(cell)
    last = last_word(cell.folder)
    code = None if last is None else last["code"]
    if code == FINISHED:
        values = RunFolder(cell.folder).last_validation()
        if not values:
            raise ConfigError(
                f"cell {cell.config.name} has no validation loss: a study needs data with a validation split"
            )
        return Result(cell, "finished", config, values["val_loss"], values["val_bits_per_byte"])
    if last is not None and code == DIVERGED:
        return Result(cell, "diverged", config, note=last["text"].split(": ")[0])
    if code == STOPPED and rule is not None and (verdict := read_hopeless(cell)).get("rule") == rule.model_dump():
        note = f"at step {verdict['step']} its loss was {verdict['loss']:.3f}, that of {verdict['best']} "
        return Result(cell, "stopped early", config, note=note + f"{verdict['best_loss']:.3f}")
    return Result(cell, "unfinished", config)


def look_at_tuning(study: Study) -> list[Result]:
    """Of all cells that are tuned, in their order."""
    return [look(cell, study.stop_early) for cell in study.tuning()]


def last_word(run: Path) -> dict[str, Any] | None:
    """What the run said at the end of the newest launch that came to one."""
    words = sorted(run.glob(f"{LAUNCHES}/*/{OUTCOME}"), key=lambda path: path.stat().st_mtime_ns)
    return dict(json.loads(words[-1].read_text(encoding="utf-8"))) if words else None


def read_hopeless(cell: Cell) -> dict[str, Any]:
    """What `write_hopeless` wrote; empty if it did not."""
    path = cell.folder / HOPELESS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def write_hopeless(cell: Cell, verdict: dict[str, Any]) -> None:
    write_atomically(cell.folder / HOPELESS, json.dumps(verdict, indent=2).encode() + b"\n")


def _resolved(cell: Cell) -> RunConfig:
    """The configuration of the run that lies there under the cell's name, which is the cell, or a ConfigError."""
    folder = RunFolder(cell.folder)
    if not folder.config.exists():
        return cell.config
    config = folder.read_config()
    there = flatten(config)
    for key, value in _comparable(cell.config).items():
        if there[key] != value:
            raise ConfigError(
                f"cell {cell.config.name} was run with another configuration ({key} {there[key]}, not {value}): give "
                f"the study another name, or remove {cell.folder} to run it again"
            )
    return config


def _comparable(config: RunConfig) -> dict[str, Any]:
    """Without what a run resolves by itself, and without where it lies."""
    keys = flatten(config)
    del keys["runs_dir"]
    if keys["model.vocab_size"] is None:
        del keys["model.vocab_size"]
    return keys
