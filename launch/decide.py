"""After a launch in a SLURM job, is the job to be requeued? ``python -m launch decide LAUNCH ...`` prints ``requeue``
or ``end CODE``, and why on standard error.

Exit codes do not tell: torchrun and srun replace them. The run's own word in ``outcome.json`` does, and where there is
none, the run was killed or crashed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.launches import Launch, committed_step, launches_of, read
from pretrain.arguments import Parser

FINISHED, STOPPED = 0, 75


class Decision(NamedTuple):
    requeue: bool
    code: int  # of the job, where it ends
    why: str


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m launch decide", description=__doc__)
    parser.add_argument("launch", type=Path, help="the launch's folder")
    parser.add_argument("--terminated", action="store_true", help="the batch script got SIGTERM")
    parser.add_argument("--max-requeues", type=int, default=100, help="of one job (default 100)")
    parser.add_argument("--max-failures", type=int, default=3, help="in a row without progress (default 3)")
    given = parser.parse_args(arguments)
    launch = read(given.launch)
    decision = decide(
        launch.outcome,
        errors=launch.errors,
        terminated=given.terminated,
        requeues=launch.restart or 0,
        max_requeues=given.max_requeues,
        failures=failures(launch, launches_of(Path(launch.run)), committed_step(Path(launch.run))),
        max_failures=given.max_failures,
    )
    print("requeue" if decision.requeue else f"end {decision.code}")
    print(f"launch: {decision.why}", file=sys.stderr)
    return 0


def failures(launch: Launch, launches: list[Launch], step: int) -> int:
    """How many launches of this job in a row, up to this one, ended without a word and committed nothing new.
    ``step``: of the newest committed checkpoint."""
    count = 0
    for one in reversed([one for one in launches if one.job == launch.job and one.began <= launch.began]):
        if one.outcome is not None or step > one.step:
            break
        count += 1
    return count


def decide(
    outcome: dict[str, Any] | None,
    *,
    errors: Sequence[str] = (),
    terminated: bool,
    requeues: int,
    max_requeues: int,
    failures: int,
    max_failures: int,
) -> Decision:
    """``errors``: what was noticed of a crash; ``requeues``: so far; ``failures``: as in `failures`.

    A run that was stopped by a signal, or that crashed, goes on in the same job. One that is finished, that was told
    to stop by its user, or whose end would be the same each time, does not. Neither does one whose batch script got
    SIGTERM: it was cancelled, or SLURM requeues it by itself.
    """
    code = None if outcome is None else outcome["code"]
    crash = errors[0] if errors else "it ended without a word: killed, or crashed"
    text = crash if outcome is None else outcome["text"]
    if code is not None and code not in (FINISHED, STOPPED):
        return Decision(False, code, f"{text}; starting again would not mend that")
    if code == FINISHED:
        return Decision(False, FINISHED, "the run is finished")
    if terminated:
        return Decision(False, 1 if code is None else code, f"{text}; the job was told to end")
    if outcome is not None and outcome.get("reason") != "signal":
        return Decision(False, STOPPED, f"{text}, as asked; submit it again to go on")
    if requeues >= max_requeues:
        return Decision(False, 1 if code is None else code, f"{text}; requeued {requeues} times, which is the cap")
    if code is None and failures >= max_failures:
        return Decision(
            False, 1, f"{text}; so did {failures} launches in a row, without a new checkpoint: see what they printed"
        )
    return Decision(True, 0, f"{text}; requeue {requeues + 1} of at most {max_requeues}")
