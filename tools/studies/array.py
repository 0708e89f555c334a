"""A study as SLURM arrays: one element for each cell that is tuned, then one for each final cell, then the report.

Which values the final cells have is not known when they are submitted, but how many there are is: each element chooses
for itself once the tuning array has ended, and all choose alike. launch/study.sbatch asks ``main`` here for the cell of
its number, and has it trained by launch/train.sbatch: several nodes, preemption, requeue. The code and the study are
copied at submission; nothing edited later changes what is compared.
"""

from __future__ import annotations

import hashlib
import json
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from models.errors import ConfigError
from pretrain.arguments import Parser
from pretrain.files import write_atomically
from tools.command import run
from tools.studies.choosing import choose
from tools.studies.grid import Cell, Study, named, read_study
from tools.studies.hopeless import stop_if_hopeless
from tools.studies.outcomes import Result, look, look_at_tuning
from tools.studies.running import write_cell

_JUDGED = 20.0  # seconds between two looks at the losses, which all nodes read from one file system


def submit(path: Path, options: Sequence[str], at_a_time: int | None, dry: bool) -> None:
    """Submit what is not over of the study in ``path``, and print the jobs; ``dry``: only print what they would be.

    ``options``: of sbatch, for every job. ``at_a_time``: cells that may run at once, None for all that the cluster has
    room for.
    """
    if not dry and shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no sbatch here: submit from a host of the cluster, or write --dry-run to see the jobs"
        )
    study = read_study(path)
    frozen = _freeze(study.folder, dry)
    text = json.dumps(study.model_dump(exclude_unset=True), indent=1)
    file = study.folder / f"submitted-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"  # JSON is YAML
    if not dry:
        write_atomically(file, text.encode())
    after = ""
    for phase in ("tuning", "final", "report"):
        elements = _elements(study, phase)
        if not elements:
            continue
        folder = str(study.folder).replace("%", "%%")  # sbatch fills in what follows one percent sign
        output = f"{folder}/slurm-{phase}-{'%j' if phase == 'report' else '%A_%a'}.out"
        words = ["sbatch", "--parsable", f"--job-name={study.name}-{phase}", f"--output={output}", *options]
        if phase != "report":
            words.append(f"--array={_ranges(elements)}" + (f"%{at_a_time}" if at_a_time else ""))
        if after:
            words.append(f"--dependency=afterany:{after}")  # a cell that diverged or was stopped early counts as failed
        words += [f"{frozen}/code/launch/study.sbatch", str(frozen), str(file), phase]
        if dry:
            print(shlex.join(words))
            after = phase.upper()
        else:
            after = _sbatch(words)
            print(f"{phase}: job {after}" + (f", {len(elements)} cells" if phase != "report" else ""))


def cell_of(study: Study, phase: str, element: int) -> Cell | None:
    """The cell of an array's element; None for a final one whose arm has no values to train."""
    if phase == "tuning":
        return study.tuning()[element]
    arm = [*study.candidates][element // len(study.seeds)]
    results = look_at_tuning(study)
    waiting = [result.cell.config.name for result in results if result.cell.arm == arm and not result.is_over]
    if waiting:
        raise ConfigError(f"{named(arm)} has cells still to be tuned ({', '.join(waiting)}): submit the study again")
    return _final(study, results)[element]


def main() -> None:
    parser = Parser(prog="python -m tools.studies.array", description="What launch/study.sbatch calls.")
    parser.add_argument("study", type=Path, help="the study's file")
    parser.add_argument("phase", choices=["tuning", "final"])
    parser.add_argument("element", type=int, help="of the array")
    parser.add_argument(
        "--watch", action="store_true", help="stop the cell once it is hopeless, until standard input ends"
    )
    arguments = parser.parse_args()
    study = read_study(arguments.study)
    rule = study.stop_early if arguments.phase == "tuning" else None
    cell = cell_of(study, arguments.phase, arguments.element)
    if arguments.watch:
        while cell is not None and rule is not None and not stop_if_hopeless(cell, study.tuning(), rule):
            if select.select([sys.stdin], [], [], _JUDGED)[0]:
                break
    elif cell is not None and not look(cell, rule).is_over:
        print(write_cell(cell))  # nothing where there is nothing to train


def _elements(study: Study, phase: str) -> list[int]:
    """Those that are not over, as far as it is known which cell an element is."""
    if phase == "report":
        return [0]
    if phase == "final" and study.tune_seeds is None:
        return []  # what was tuned is what is reported
    tuning = look_at_tuning(study)
    if phase == "tuning":
        return [i for i, result in enumerate(tuning) if not result.is_over]
    if not all(result.is_over for result in tuning):
        return list(range(len(study.candidates) * len(study.seeds)))
    cells = enumerate(_final(study, tuning))
    return [i for i, cell in cells if cell is not None and not look(cell, None).is_over]


def _final(study: Study, tuning: Sequence[Result]) -> list[Cell | None]:
    """By element."""
    chosen = choose(study, tuning)
    pairs = [(arm, seed) for arm in study.candidates for seed in study.seeds]
    return [study.cell(arm, chosen[arm], seed) if arm in chosen else None for arm, seed in pairs]


def _ranges(numbers: Sequence[int]) -> str:
    """As sbatch takes them: 0-3,5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in parts)


def _freeze(folder: Path, dry: bool) -> Path:
    """A copy of the code in the study's folder. ``dry``: only where it would be."""
    command = [sys.executable, "-m", "launch", "freeze", *(["--dry-run"] if dry else []), "--code", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(done.stderr.strip().removeprefix("error: ") or "the code cannot be copied")
    return Path(done.stdout.strip())


def _sbatch(words: Sequence[str]) -> str:
    """The job's number."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"sbatch refuses: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


if __name__ == "__main__":
    run(main)
