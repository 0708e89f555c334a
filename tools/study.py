"""Run a grid of runs and set the best of every arm side by side, each tuned over equally many values.

    python -m tools.study configs/studies/tiny.yaml --workers 2             here, one after another
    python -m tools.study configs/studies/tiny.yaml --slurm --nodes 1       as SLURM arrays, with options of sbatch

A study is YAML: ``run`` is what all cells share; under ``factors`` every combination of one choice each is an arm; the
lists under a choice's ``tune`` are tried in each of its arms under ``tune_seeds``, and the value with the lowest
validation loss is run under ``seeds``. Finished cells are not run again and stopped ones go on, so the same command
resumes a study. It ends in runs/NAME/report.html, and the same as report.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from models.errors import ConfigError
from pretrain.arguments import Parser
from tools.command import run
from tools.page import check_packages
from tools.studies.array import submit
from tools.studies.choosing import choose
from tools.studies.grid import Cell, StopEarly, Study, read_study
from tools.studies.outcomes import STOPPED, Result
from tools.studies.report import write_verdict
from tools.studies.running import Interrupted, run_cells
from tools.studies.sections import summary
from tools.studies.verdict import Verdict


def run_here(study: Study, workers: int) -> None:
    """All cells that are not over: those that are tuned, then the final ones."""
    progress = Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    )

    def phase(name: str, cells: Sequence[Cell], rule: StopEarly | None) -> list[Result]:
        task = progress.add_task(name, total=len(cells))

        def tell(result: Result, before: bool) -> None:
            if not before:
                loss = "" if result.loss is None else f" {result.loss:.4f}"
                line = f"{result.cell.config.name}: {result.state}{loss}"
                progress.console.print(line, markup=False, highlight=False)
            progress.advance(task)

        return run_cells(cells, rule, workers, tell)

    with progress:
        tuned = phase("tuning", study.tuning(), study.stop_early)
        if study.tune_seeds is not None:  # else what was tuned is what is reported
            phase("final", study.final(choose(study, tuned)), None)


def report(study: Study) -> None:
    """Write it, and print what matters most of it."""
    verdict = Verdict.of(study)
    write_verdict(verdict)
    print(summary(verdict))
    print(f"\nreport: {study.folder / 'report.html'}")


def _terminated(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"asked to stop by {signal.Signals(number).name}")


def main() -> None:
    parser = Parser(prog="python -m tools.study", description="Run a grid of runs and compare them.")
    parser.add_argument("study", type=Path, help="a study's YAML file, as configs/studies/tiny.yaml")
    parser.add_argument(
        "--workers", type=int, help="cells at a time; here they share the cores (default 2; all in an array)"
    )
    parser.add_argument("--report", action="store_true", help="run nothing: report on what there is")
    parser.add_argument("--dry-run", action="store_true", help="with --slurm: only show what would be submitted")
    parser.add_argument(
        "--slurm",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="submit arrays instead; all that follows is options of sbatch",
    )
    arguments = parser.parse_args()
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers is {arguments.workers}: write a positive number")
    if arguments.dry_run and arguments.slurm is None:
        raise ConfigError("--dry-run shows what --slurm would submit: write --slurm too, or leave it out")
    study = read_study(arguments.study)
    check_packages("a study's report")
    if arguments.slurm is not None:
        options = [option for option in arguments.slurm if option != "--dry-run"]
        submit(arguments.study, options, arguments.workers, dry=arguments.dry_run or options != arguments.slurm)
        return
    if not arguments.report:
        before = signal.signal(signal.SIGTERM, _terminated)
        try:
            run_here(study, arguments.workers or 2)
        except Interrupted as stopped:
            print(f"stopped: {stopped}; the same command goes on", file=sys.stderr)
            sys.exit(STOPPED)
        finally:
            signal.signal(signal.SIGTERM, before)
    report(study)


if __name__ == "__main__":
    run(main)
