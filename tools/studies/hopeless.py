"""Stop a cell that is being tuned once it is far behind its own arm.

It is held against the cells of the same arm and seed only, never against other arms: those may learn slower at first
and are not to be judged by it. Same seed means the same tokens in every step, so losses of one step can be compared as
they are. The run is asked by its stop file, commits a checkpoint, and could go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pretrain.control import STOP_FILE
from pretrain.counts import derive_counts
from pretrain.run import RunFolder
from tools.studies.grid import Cell, StopEarly
from tools.studies.outcomes import write_hopeless


def rivals(cell: Cell, cells: Iterable[Cell]) -> list[Cell]:
    """Those of ``cells`` that ``cell`` is held against."""
    return [one for one in cells if (one.arm, one.seed) == (cell.arm, cell.seed) and one.tuned != cell.tuned]


def verdict(
    own: dict[int, float], others: dict[str, dict[int, float]], steps: int, rule: StopEarly
) -> dict[str, Any] | None:
    """Why a run is hopeless, or None. ``own`` and ``others`` are training losses by step; of others, by name.

    It is judged at the last step that both it and another have logged, against the lowest loss that others had there.
    """
    step = max((step for step in own if any(step in losses for losses in others.values())), default=0)
    if step < rule.after * steps:
        return None
    there = {losses[step]: name for name, losses in others.items() if step in losses}
    best = min(there)
    if own[step] - best <= rule.worse_by:
        return None
    return {"step": step, "loss": own[step], "best": there[best], "best_loss": best, "rule": rule.model_dump()}


def stop_if_hopeless(cell: Cell, cells: Iterable[Cell], rule: StopEarly) -> bool:
    """Look at the run of ``cell`` now, and ask it to stop if ``rule`` says so; whether it did."""
    others = {one.config.name: training_losses(one) for one in rivals(cell, cells)}
    steps = derive_counts(cell.config, world_size=1).steps
    found = verdict(training_losses(cell), others, steps, rule)
    if found is None:
        return False
    write_hopeless(cell, found)
    (cell.folder / STOP_FILE).touch()
    return True


def training_losses(cell: Cell) -> dict[int, float]:
    """By step, as far as they are logged and finite."""
    records = RunFolder(cell.folder).records()
    return {record["step"]: record["loss"] for record in records if record.get("loss") is not None}
