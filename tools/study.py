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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from models.errors import ConfigError, nearest
from pretrain.cli import build, dump, merge, read_tree
from pretrain.run import RunFolder
from tools.command import run

_KEYS = ("name", "run", "factors", "seeds")


@dataclass(frozen=True)
class Cell:
    """One run of the grid: an arm, the tuned values, a seed."""

    arm: tuple[str, ...]
    tuned: tuple[tuple[str, Any], ...]
    seed: int
    tree: Mapping[str, Any]

    @property
    def name(self) -> str:
        values = "".join(f"-{key.rsplit('.', 1)[-1]}{value:g}" for key, value in self.tuned)
        return f"{'-'.join(self.arm)}{values}-seed{self.seed}"


@dataclass(frozen=True)
class Result:
    cell: Cell
    diverged: bool
    loss: float | None
    bits_per_byte: float | None


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def cells(study: Mapping[str, Any]) -> Iterator[Cell]:
    """Every run of the study, its configuration checked."""
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
                build(merge(one, {"name": cell.name}), f"cell {cell.name}")
                yield cell


def read_study(path: Path) -> dict[str, Any]:
    study = read_tree(path)
    for key in study:
        if key not in _KEYS:
            raise ConfigError(f"{path}: a study has no key {key!r}; {nearest(key, _KEYS)}")
    for key in ("name", "run", "factors"):
        if key not in study:
            raise ConfigError(f"{path}: {key} is missing; see configs/studies/tiny.yaml")
    return study


def _run_cell(cell: Cell, folder: Path, threads: int) -> Result:
    """Train one cell in a process of its own, or read what an earlier call left."""
    config = build(merge(cell.tree, {"name": cell.name, "runs_dir": str(folder)}), f"cell {cell.name}")
    here = folder / cell.name
    outcome = folder / f"{cell.name}.exit"
    if not outcome.exists():
        here.mkdir(parents=True, exist_ok=True)
        (folder / f"{cell.name}.yaml").write_text(dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "pretrain", str(folder / f"{cell.name}.yaml")]
        with (folder / f"{cell.name}.log").open("a", encoding="utf-8") as log:
            code = subprocess.run(
                command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=False
            ).returncode
        if code not in (0, 3):
            raise ConfigError(f"cell {cell.name} ended with exit code {code}; see {folder / cell.name}.log")
        outcome.write_text(f"{code}\n", encoding="utf-8")
    diverged = outcome.read_text(encoding="utf-8").strip() == "3"
    last = {} if diverged else RunFolder(here).last_validation()
    return Result(cell, diverged, last.get("val_loss"), last.get("val_bits_per_byte"))


def best(results: list[Result]) -> dict[tuple[str, ...], Result]:
    """Of every arm the result with the lowest mean validation loss over the seeds (its first seed stands for it)."""
    chosen: dict[tuple[str, ...], Result] = {}
    means: dict[tuple[str, ...], float] = {}
    key = lambda r: (r.cell.arm, r.cell.tuned)  # noqa: E731
    for (arm, _), group in itertools.groupby(sorted(results, key=key), key=key):
        seeds = list(group)
        losses = [r.loss for r in seeds if r.loss is not None]
        if len(losses) == len(seeds) and sum(losses) / len(losses) < means.get(arm, float("inf")):
            means[arm] = sum(losses) / len(losses)
            chosen[arm] = seeds[0]
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
        loss = "diverged" if result.diverged else f"{result.loss:.4f}"
        bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        winner = chosen.get(cell.arm)
        mark = "best" if winner is not None and winner.cell.tuned == cell.tuned else ""
        lines.append("| " + " | ".join([*cell.arm, tuned, str(cell.seed), loss, bits, mark]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.study", description="Run a grid of runs and compare them.")
    parser.add_argument("study", type=Path, help="a study's YAML file, as configs/studies/tiny.yaml")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; they share the cores (default 2)")
    arguments = parser.parse_args()
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
    summary = [{"arm": r.cell.arm, "tuned": dict(r.cell.tuned), "loss": r.loss} for r in best(results).values()]
    (folder / "best.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    print(table(study, results), end="")


if __name__ == "__main__":
    run(main)
