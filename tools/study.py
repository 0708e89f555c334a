"""Run a grid of runs and set the best of every arm side by side, each tuned over the same values.

    python -m tools.study configs/studies/tiny.yaml --workers 2

A study is YAML: ``run`` is what all cells share; under ``factors`` every combination of one choice each is an arm; the
lists under a choice's ``tune`` are tried in each of its arms, and the value with the lowest validation loss counts.
Finished cells are not run again, stopped ones go on, so the same command resumes a study.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import BaseModel, Field, ValidationError
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from models.errors import ConfigError, nearest
from models.plan import resolve_plan
from pretrain.cli import build, dump, load, merge, read_tree
from pretrain.counts import derive_counts
from pretrain.run import RunFolder
from tools.command import run

_Filled = Field(min_length=1)


class _Choice(BaseModel, strict=True, extra="allow"):
    tune: dict[str, Annotated[list[int | float], _Filled]] = {}


class _Study(BaseModel, strict=True):
    """The shape of a study's file; what is in ``run`` and in a choice is checked as each cell is built."""

    name: str
    run: dict[str, Any]
    factors: Annotated[dict[str, Annotated[dict[str, _Choice], _Filled]], _Filled]
    seeds: Annotated[list[int], _Filled] = [0]


Arm = tuple[str, ...]
Tuned = tuple[tuple[str, int | float], ...]


@dataclass(frozen=True)
class Cell:
    """One run of the grid: an arm, the tuned values, a seed."""

    arm: Arm
    tuned: Tuned
    seed: int
    tree: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its folder and files."""
        values = "".join(f"-{key.rsplit('.', 1)[-1]}{value:g}" for key, value in self.tuned)
        return f"{'-'.join(self.arm)}{values}-seed{self.seed}"


@dataclass(frozen=True)
class Result:
    """What came of a cell: the last validation, or None and None if it diverged."""

    cell: Cell
    loss: float | None
    bits_per_byte: float | None


class Best(NamedTuple):
    """The tuned values of an arm that count, and their mean validation loss over the seeds."""

    tuned: Tuned
    loss: float


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def cells(study: Mapping[str, Any]) -> Iterator[Cell]:
    """Every run of the study, its configuration checked and its name its own."""
    names: set[str] = set()
    for choices in itertools.product(*(choices.items() for choices in study["factors"].values())):
        tree = dict(study["run"])
        for _, choice in choices:
            tree = merge(tree, choice)
        grid = tree.pop("tune", {})
        for values in itertools.product(*grid.values()):
            tuned = tuple(zip(grid, values, strict=True))
            for seed in study.get("seeds", [0]):
                one = merge(tree, {"seed": seed, "runs_dir": f"runs/{study['name']}"})
                for key, value in tuned:
                    one = merge(one, _nested(key, value))
                cell = Cell(tuple(name for name, _ in choices), tuned, seed, one)
                config = build(merge(one, {"name": cell.name}), f"cell {cell.name}")
                resolve_plan(config.model)
                derive_counts(config, world_size=1)
                if cell.name in names:
                    raise ConfigError(
                        f"two cells are called {cell.name}: let seeds, tuned values (to six digits) and choices differ"
                    )
                names.add(cell.name)
                yield cell


def read_study(path: Path) -> dict[str, Any]:
    """The study in a YAML file, in its right shape."""
    study = read_tree(path)
    for key in study:
        if key not in _Study.model_fields:
            raise ConfigError(f"{path}: a study has no key {key!r}; {nearest(key, _Study.model_fields)}")
    for key, field in _Study.model_fields.items():
        if field.is_required() and key not in study:
            raise ConfigError(f"{path}: {key} is missing; see configs/studies/tiny.yaml")
    try:
        _Study.model_validate(study)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{path}: {where} is {first['input']!r}: {first['msg'].lower()}; see configs/studies/tiny.yaml"
        ) from None
    return study


def _run_cell(cell: Cell, folder: Path, threads: int) -> Result:
    """Train one cell in a process of its own, or read what an earlier call left."""
    config = build(merge(cell.tree, {"name": cell.name, "runs_dir": str(folder)}), f"cell {cell.name}")
    here = folder / cell.name
    written, outcome = folder / f"{cell.name}.yaml", folder / f"{cell.name}.exit"
    if outcome.exists():
        if load(written) != config:
            raise ConfigError(
                f"cell {cell.name} was run with another configuration, {written}: give the study another name, or "
                f"remove {outcome} and {here} to run it again"
            )
    else:
        here.mkdir(parents=True, exist_ok=True)
        written.write_text(dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "pretrain", str(written)]
        with (folder / f"{cell.name}.log").open("a", encoding="utf-8") as log:
            code = subprocess.run(
                command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=False
            ).returncode
        if code not in (0, 3):
            raise ConfigError(f"cell {cell.name} ended with exit code {code}; see {folder / cell.name}.log")
        outcome.write_text(f"{code}\n", encoding="utf-8")
    if outcome.read_text(encoding="utf-8").strip() == "3":
        return Result(cell, None, None)
    last = RunFolder(here).last_validation()
    if not last:
        raise ConfigError(f"cell {cell.name} has no validation loss: a study needs data with a validation split")
    return Result(cell, last["val_loss"], last["val_bits_per_byte"])


def best(results: list[Result]) -> dict[Arm, Best]:
    """Of every arm the tuned values with the lowest mean loss over the seeds, among those where none diverged."""
    losses: defaultdict[tuple[Arm, Tuned], list[float]] = defaultdict(list)
    for result in results:
        losses[result.cell.arm, result.cell.tuned].append(inf if result.loss is None else result.loss)
    chosen: dict[Arm, Best] = {}
    for (arm, tuned), seeds in losses.items():
        mean = fmean(seeds)
        if mean < (chosen[arm].loss if arm in chosen else inf):
            chosen[arm] = Best(tuned, mean)
    return chosen


def table(study: Mapping[str, Any], results: list[Result]) -> str:
    """Markdown: a row per arm and tuned value, the best of each arm marked."""
    chosen = best(results)
    lines = [
        "| " + " | ".join([*study["factors"], "tuned", "seed", "validation loss", "bits per byte", ""]) + " |",
        "|" + "---|" * (len(study["factors"]) + 5),
    ]
    for result in results:
        cell = result.cell
        tuned = ", ".join(f"{key} {value:g}" for key, value in cell.tuned)
        loss = "diverged" if result.loss is None else f"{result.loss:.4f}"
        bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        winner = chosen.get(cell.arm)
        mark = "best" if winner is not None and winner.tuned == cell.tuned else ""
        lines.append("| " + " | ".join([*cell.arm, tuned, str(cell.seed), loss, bits, mark]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.study", description="Run a grid of runs and compare them.")
    parser.add_argument("study", type=Path, help="a study's YAML file, as configs/studies/tiny.yaml")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; they share the cores (default 2)")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        raise ConfigError(f"--workers is {arguments.workers}: write a positive number")
    study = read_study(arguments.study)
    grid = list(cells(study))
    folder = Path("runs") / study["name"]
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // arguments.workers)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(arguments.workers) as pool:
        task = progress.add_task("cells", total=len(grid))
        results = []
        for result in pool.map(lambda cell: _run_cell(cell, folder, threads), grid):
            results.append(result)
            progress.advance(task)
    (folder / "table.md").write_text(table(study, results), encoding="utf-8")
    summary = [{"arm": arm, "tuned": dict(tuned), "loss": loss} for arm, (tuned, loss) in best(results).items()]
    (folder / "best.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    print(table(study, results), end="")


if __name__ == "__main__":
    run(main)
