"""Preempt a run again and again, at random moments and by signals to any of its processes, and see what comes out.

    python -m tests.cluster.drill --rounds 30 [--seed 0]

A round waits for a phase of the run, and a random while more; sends the signal; and then wants one end on request with
a committed checkpoint, one requeue, and a launch that goes on from that checkpoint. After the last round the run
finishes, and has to be, bit for bit, the one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import Literal, NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.cluster.jobs import Job, configuration, same
from tests.cluster.slurm import Slurm
from tests.runs import prepare_corpus

Phase = Literal["start-up", "compile", "step", "validation", "save"]
Target = Literal["batch script", "all processes", "one rank", "one node"]
PHASES: tuple[Phase, ...] = ("start-up", "compile", "step", "validation", "save")
TARGETS: tuple[Target, ...] = ("batch script", "all processes", "one rank", "one node")
_STEPS = 10  # of a round: every phase comes within them


class Round(NamedTuple):
    phase: Phase
    target: Target
    signal: str
    step: int  # of the checkpoint
    to_checkpoint: float  # seconds from the signal to the run's last word
    to_resume: float  # and to the first step after it


Advance = Callable[[Round], None]


def drill(
    slurm: Slurm, folder: Path, data: Path, rounds: int, seed: int, advance: Advance = lambda one: None
) -> list[Round]:
    """``rounds`` interruptions of one run; AssertionError where one does not go as it should."""
    chance = random.Random(seed)
    train = {"steps": 20 + _STEPS * rounds, "compile": True}
    undisturbed = Job.submit(slurm, configuration(folder, data, name="undisturbed", train=train))
    assert undisturbed.until_ended(timeout=60 + 2 * train["steps"]) == "COMPLETED", undisturbed.output
    job = Job.submit(slurm, configuration(folder, data, name="disturbed", train=train))
    done = []
    for number in range(rounds):
        done.append(_round(job, number, PHASES[number % len(PHASES)], chance))
        advance(done[-1])
    assert job.until_ended(timeout=60 + 2 * train["steps"]) == "COMPLETED", job.output
    assert job.restarts == rounds, f"requeued {job.restarts} times in {rounds} rounds"
    same(undisturbed.run, job.run)
    return done


def _round(job: Job, number: int, phase: Phase, chance: random.Random) -> Round:
    job.until_running(number)
    before = job.committed
    _wait_for(job, number, phase, chance)
    target, name = _send(job, phase, chance)
    sent = time.monotonic()
    job.slurm.until(f"the last word of launch {number}", lambda: job.launches[number].outcome, timeout=90)
    saved = time.monotonic() - sent
    outcome = job.launches[number].outcome
    assert outcome is not None
    assert (outcome["code"], outcome["reason"]) == (75, "signal"), outcome
    assert job.committed == outcome["step"] >= before, f"{outcome}, but the checkpoint is of step {job.committed}"
    job.slurm.until(f"launch {number + 1} goes on", lambda: _goes_on(job, number + 1), timeout=120)
    text = job.printed(number + 1)
    assert f"going on after step {outcome['step']}\n" in text, text
    return Round(phase, target, name, outcome["step"], saved, time.monotonic() - sent)


def _goes_on(job: Job, restart: int) -> bool:
    return len(job.launches) > restart and "going on after step" in job.printed(restart)


def _wait_for(job: Job, launch: int, phase: Phase, chance: random.Random) -> None:
    slurm = job.slurm
    if phase == "start-up":
        slurm.until("the batch script has begun", lambda: len(job.launches) > launch, timeout=60)
        time.sleep(chance.uniform(0, 5))
        return
    slurm.until("the model is built", lambda: "mSGDW" in job.printed(launch), timeout=90)
    if phase == "compile":
        time.sleep(chance.uniform(0, 3))
        return
    if phase == "save":
        partial = f"checkpoints/.step-{(job.committed // 8 + 1) * 8:08d}.partial"
        slurm.until("a save", (job.run / partial).exists, timeout=90, period=0.002)
        return
    seen: list[int] = []

    def comes() -> bool:
        lines = job.steps(launch)
        seen[:] = [step for step in dict.fromkeys(lines) if (step % 10 == 0) == (phase == "validation")]
        return bool(seen) and (phase == "step" or lines.count(seen[-1]) == 1)

    slurm.until(phase, comes, timeout=90, period=0.01)
    time.sleep(chance.uniform(0, 0.3))


def _send(job: Job, phase: Phase, chance: random.Random) -> tuple[Target, str]:
    """To whom, and which. Before the loop a rank ends on SIGTERM, as any program does: that is no preemption."""
    target: Target = chance.choice(TARGETS)
    number = chance.choice(
        [Signals.SIGUSR1] if phase in ("start-up", "compile") else [Signals.SIGUSR1, Signals.SIGTERM]
    )
    node = chance.choice(job.slurm.nodes)
    ranks, agent = job.processes(node, "ranks"), job.processes(node, "agent")
    if target in ("one rank", "one node") and not (ranks and agent):
        target = "batch script"  # they are not there yet
    if target == "batch script":  # on SIGTERM it ends for good, as a cancelled job should
        number = Signals.SIGUSR1
        job.slurm.on("ctl", "scancel", f"--signal={number.name}", "--batch", job.number)
    elif target == "all processes":
        number = Signals.SIGUSR1
        job.slurm.on("ctl", "scancel", f"--signal={number.name}", job.number)
    else:
        for pid in ranks if target == "one rank" else ranks + agent:
            job.slurm.signal(node, pid, number)
    return target, number.name


def table(rounds: list[Round], seconds: float) -> str:
    """Markdown: a line for each phase."""
    lines = [
        "| phase | rounds | by | to the checkpoint, s | to the next launch's start, s |",
        "|---|---|---|---|---|",
    ]
    for phase in PHASES:
        of = [one for one in rounds if one.phase == phase]
        if of:
            targets = ", ".join(f"{count} {name}" for name, count in Counter(one.target for one in of).most_common())
            spans = [[getattr(one, key) for one in of] for key in ("to_checkpoint", "to_resume")]
            shown = " | ".join(f"{min(span):.1f} to {max(span):.1f}" for span in spans)
            lines.append(f"| {phase} | {len(of)} | {targets} | {shown} |")
    return "\n".join([*lines, "", f"{len(rounds)} rounds in {seconds:.0f} s; the weights are the undisturbed run's."])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.drill", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="drill") as folder,
        Slurm.start(Path(folder) / "slurm", 2) as slurm,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("rounds", total=given.rounds)

        def advance(one: Round) -> None:
            progress.console.print(f"{one.phase}, {one.signal} to {one.target}: step {one.step}", highlight=False)
            progress.advance(task)

        rounds = drill(slurm, Path(folder), prepare_corpus(Path(folder) / "corpus"), given.rounds, given.seed, advance)
    print(table(rounds, time.monotonic() - began))


if __name__ == "__main__":
    main()
