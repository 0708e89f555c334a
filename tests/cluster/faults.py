"""What happens to a run when something breaks, and how long until it trains again or has clearly ended.

    python -m tests.cluster.faults [FAULT ...]      prints the table of docs/results.md

Each fault meets a run of two ranks on two of four nodes, in the middle of its steps, with a checkpoint committed. The
run either goes on from it in the same job, or the job ends for good; both within a stated bound, which follows from
the cluster's settings (sim/slurm.conf.in) and from parallel.silence, 5 s here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import NamedTuple

from rich.console import Console

from tests.cluster.jobs import Job, configuration
from tests.cluster.slurm import Slurm
from tests.runs import prepare_corpus

_REQUEUE = 10  # seconds that SLURM lets a requeued job wait here: cred_expire, KillWait and its own rounds
_START = 45  # from the batch script's start to the first step, on two cores that the whole cluster shares
_DOWN = 25  # until SLURM takes a silent node for dead


class Fault(NamedTuple):
    """``strike`` does it to a job in its steps; ``goes_on``: whether the job is to train again; ``bound``: seconds."""

    name: str
    strike: Callable[[Job], None]
    goes_on: bool
    bound: float
    options: tuple[str, ...] = ()


class Outcome(NamedTuple):
    fault: str
    what: str
    seconds: float
    bound: float
    lost: int  # steps between the last one seen and the checkpoint that the run goes on from, or ended with


def _kill(of: str, node: int, number: Signals = Signals.SIGKILL) -> Callable[[Job], None]:
    """A signal to the processes of the ``node``-th of the job's nodes."""

    def strike(job: Job) -> None:
        host = job.launches[-1].nodes[node]
        pids = job.processes(host, of)
        assert pids, f"no {of} on {host}"
        for pid in pids:
            job.slurm.signal(host, pid, number)

    return strike


def _node(operation: str, node: int) -> Callable[[Job], None]:
    return lambda job: job.slurm.fault(operation, job.launches[-1].nodes[node])  # type: ignore[arg-type]


def _slurmd(job: Job) -> None:
    job.slurm.on(job.launches[-1].nodes[1], "sh", "-c", 'kill -KILL "$(cat /run/slurmd.pid)"')


def _preempt(job: Job) -> None:
    """By a job of a higher partition, which wants all nodes for a second."""
    job.slurm.sbatch("--partition=high", "--nodes=4", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")


def _limit(job: Job) -> None:
    """A limit that is near: SLURM looks every 30 s, and sends the signal that --signal asks for."""
    job.slurm.on("ctl", "scontrol", "update", f"jobid={job.number}", "timelimit=1")


FAULTS = {
    "requeue": Fault("scontrol requeue", lambda job: job.slurm.requeue(job.number), True, _REQUEUE + _START),
    "preemption": Fault("a job of a higher partition", _preempt, True, 10 + _REQUEUE + _START),
    "limit": Fault("the time limit", _limit, True, 60 + _REQUEUE + _START, ("--signal=B:USR1@30",)),
    "cancel": Fault("scancel", lambda job: job.slurm.cancel(job.number), False, 15),
    "rank": Fault("a rank killed (SIGKILL)", _kill("ranks", 1), True, 20 + _REQUEUE + _START),
    "frozen": Fault("a rank frozen (SIGSTOP)", _kill("ranks", 1, Signals.SIGSTOP), True, 20 + _REQUEUE + _START),
    "agent": Fault("torchrun killed on one node", _kill("agent", 1), True, 20 + _REQUEUE + _START),
    "slurmd": Fault("slurmd killed on one node", _slurmd, True, _DOWN + _REQUEUE + _START),
    "cut": Fault("network link of one node down", _node("cut", 1), True, _DOWN + _REQUEUE + _START),
    "drop": Fault("one node's packets lost in silence", _node("drop", 1), True, _DOWN + _REQUEUE + _START),
    "power": Fault("power loss of a node", _node("kill", 1), True, _DOWN + _REQUEUE + _START),
    "first": Fault("power loss of the first node", _node("kill", 0), True, _DOWN + _REQUEUE + _START + 10),
}


def suffer(slurm: Slurm, folder: Path, data: Path, key: str) -> Outcome:
    """AssertionError if the run neither goes on as it should nor ends, within the bound."""
    fault = FAULTS[key]
    config = configuration(folder, data, name=key, train={"steps": 2000}, schedule={"warmup_steps": 4})
    job = Job.submit(slurm, config, *fault.options)
    job.until_step(20)
    step, before = max(job.steps(0)), job.committed
    assert before >= 16
    began = time.monotonic()
    fault.strike(job)
    if not fault.goes_on:
        state = job.until_ended(timeout=fault.bound)
        took = time.monotonic() - began
        slurm.until("no process of the run is left", lambda: not _left(job), timeout=fault.bound)
        return Outcome(fault.name, f"ends as {state}", took, fault.bound, max(0, step - job.committed))
    slurm.until(f"{key}: the run trains again", lambda: _trains_again(job), timeout=fault.bound)
    took = time.monotonic() - began
    restart = job.launches[-1]
    assert restart.restart == 1, f"requeued {restart.restart} times"
    assert restart.step >= before, "a committed checkpoint was lost"
    if key in ("rank", "frozen", "agent"):
        assert "launch: error: rank " in job.output, "the job's output says why"
    if key in ("slurmd", "cut", "drop", "power", "first"):
        assert restart.nodes != job.launches[0].nodes, "it goes on on a node that is gone"
    (job.run / "stop").touch()
    assert job.until_ended(timeout=30) == "FAILED"  # its exit code is 75
    assert job.record["ExitCode"] == "75:0"
    assert job.committed > restart.step
    return Outcome(fault.name, "requeued, goes on", took, fault.bound, max(0, step - restart.step))


def _trains_again(job: Job) -> bool:
    return len(job.launches) > 1 and bool(job.steps(1))


def _left(job: Job) -> bool:
    return any(job.processes(node, of) for node in job.launches[-1].nodes for of in ("ranks", "agent"))


def table(outcomes: list[Outcome]) -> str:
    """Markdown."""
    lines = ["| fault | outcome | seconds | bound | steps lost |", "|---|---|---|---|---|"]
    lines += [f"| {one.fault} | {one.what} | {one.seconds:.0f} | {one.bound:.0f} | {one.lost} |" for one in outcomes]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.faults", description=__doc__)
    parser.add_argument("faults", nargs="*", choices=[[], *FAULTS], help=f"of {', '.join(FAULTS)}; default: all")
    given = parser.parse_args()
    console, outcomes = Console(stderr=True), []
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        data = prepare_corpus(Path(folder) / "corpus")
        with Slurm.start(Path(folder) / "slurm", 4) as slurm:
            for number, key in enumerate(given.faults or FAULTS, start=1):
                with console.status(f"{number} of {len(given.faults or FAULTS)}: {FAULTS[key].name}"):
                    outcomes.append(suffer(slurm, Path(folder), data, key))
                    slurm.restart()
                console.print(outcomes[-1], highlight=False)
    print(table(outcomes))


if __name__ == "__main__":
    main()
