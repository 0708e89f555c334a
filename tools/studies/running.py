"""Run cells on this machine, each in a process of its own, so many at a time.

A cell that is over is not run again, one that was stopped goes on. A cell's own folder has it all: ``cell.yaml``, from
which ``python -m pretrain`` goes on with it too, and under ``launches/`` what each start printed and how it ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.errors import ConfigError
from pretrain import launched
from pretrain.cli import dump
from pretrain.files import write_atomically
from tools.studies.grid import Cell, StopEarly
from tools.studies.hopeless import stop_if_hopeless
from tools.studies.outcomes import DIVERGED, FINISHED, LAUNCHES, STOPPED, Result, last_word, look

_PERIOD = 0.2  # seconds between two looks at the processes
_JUDGED = 5.0  # seconds between two looks at the losses


class Interrupted(Exception):
    """A cell was asked to stop, by whomever; what it had is committed."""


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    launch: Path
    slot: int
    judged: float = 0.0
    asked: bool = False


def write_cell(cell: Cell) -> Path:
    """The configuration that ``python -m pretrain`` takes."""
    path = cell.folder / "cell.yaml"
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dump(cell.config).encode())
    except OSError as error:
        raise ConfigError(f"cannot write the cell's folder {cell.folder}: {error.strerror}") from None
    return path


def run_cells(
    cells: Sequence[Cell],
    rule: StopEarly | None,
    workers: int,
    tell: Callable[[Result, bool], None],
) -> list[Result]:
    """The results of ``cells``, in their order. ``tell`` gets each as it comes, and whether it was over before.

    Raises:
        ConfigError: a cell failed. Interrupted: a cell was stopped. Those that still ran have been asked to stop, and
        committed a checkpoint, before either is raised.
    """
    results = {cell: look(cell, rule) for cell in cells}
    for result in results.values():
        if result.is_over:
            tell(result, True)
    waiting = deque(cell for cell, result in results.items() if not result.is_over)
    running: list[_Running] = []
    free = list(range(workers))
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting.popleft(), free.pop(0), workers))
            time.sleep(_PERIOD)
            for one in list(running):
                if one.process.poll() is not None:
                    running.remove(one)
                    free.append(one.slot)
                    results[one.cell] = result = _ended(one, rule)
                    tell(result, False)
                elif rule is not None and not one.asked and time.monotonic() - one.judged > _JUDGED:
                    one.judged = time.monotonic()
                    one.asked = stop_if_hopeless(one.cell, cells, rule)
    finally:
        _stop([one.process for one in running])
    return list(results.values())


def _start(cell: Cell, slot: int, workers: int) -> _Running:
    path = write_cell(cell)
    launch = cell.folder / LAUNCHES / f"study-{time.strftime('%Y%m%d-%H%M%S')}.{time.time_ns() // 10**6 % 1000:03d}"
    launch.mkdir(parents=True)
    environment = os.environ | {launched.VARIABLE: str(launch)} | gpu_of(slot)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    with (launch / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pretrain", str(path)], stdout=log, stderr=log, env=environment
        )
    return _Running(cell, process, launch, slot)


def gpu_of(slot: int) -> dict[str, str]:
    """Workers take the GPUs in turn; nothing to set where there is none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if names else {}


def _ended(one: _Running, rule: StopEarly | None) -> Result:
    """What came of it, or why it is of no use."""
    name = one.cell.config.name
    said = last_word(one.cell.folder) if (one.launch / launched.OUTCOME).exists() else None
    if said is None:
        raise ConfigError(f"cell {name} ended with exit code {one.process.returncode}; see {one.launch / 'log.txt'}")
    if said["code"] not in (FINISHED, DIVERGED, STOPPED):
        raise ConfigError(f"cell {name}: {said['text']}")
    result = look(one.cell, rule)
    if not result.is_over:
        raise Interrupted(f"cell {name} {said['text']}")
    return result


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask, and wait until each has committed its checkpoint."""
    alive = [process for process in processes if process.poll() is None]
    if alive:
        print(f"waiting for {len(alive)} cells to commit their checkpoints", file=sys.stderr)
    for process in alive:
        process.terminate()
    for process in alive:
        process.wait()
