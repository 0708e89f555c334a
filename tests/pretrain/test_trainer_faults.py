"""One rank dies or hangs: the others end within the stated time, one line names it, and the next start goes on.

Real runs under torchrun. This file is also the program that they run: ``python -m pretrain`` with a fault in it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pretrain.trainer
from pretrain.__main__ import main
from pretrain.watchdog import period_of
from tests.runs import ONE_THREAD, REPOSITORY, committed_steps, curve, write_config
from tests.runs import pretrain as run_pretrain

SILENCE, TIMEOUT = 4.0, 8.0  # seconds; training's own steps take a hundredth
PERIOD = period_of(SILENCE)
SLACK = 3.0  # seconds: processes of a busy machine end late
SLOW = 5.0  # seconds: longer than SILENCE, shorter than TIMEOUT

SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}


def strike(fault: str, folder: Path) -> None:
    """Do to this process what ``fault`` says, and leave the time."""
    if fault != "hang":  # which is what this is already
        time.sleep(2 * PERIOD)  # so that the others have heard where it was
    (folder / "struck").write_text(str(time.time()))
    match fault:
        case "kill" | "freeze":
            os.kill(os.getpid(), SIGNALS[fault])
        case "hang":
            time.sleep(1000)
        case "slow":
            time.sleep(SLOW)
        case "raise":
            raise ValueError("a wire is loose")
        case "orphan":
            os.kill(os.getppid(), signal.SIGKILL)  # torchrun, which serves the store
            time.sleep(1000)


def faulty(arguments: list[str]) -> int:
    """``pretrain``'s main, in which one rank is struck, at start (step 0) or before the collectives of a step."""
    folder, fault, rank, step, *rest = arguments
    here = os.environ["RANK"]
    (Path(folder) / f"process-{here}").write_text(str(os.getpid()))
    if here == rank:
        place, name = (pretrain.trainer.Trainer, "_resumed") if step == "0" else (pretrain.trainer, "train_step")
        original: Callable[..., Any] = getattr(place, name)

        def patched(*given: Any, **named: Any) -> Any:
            if step == "0" or given[2] + 1 == int(step):  # train_step(engine, rows, step, ...)
                strike(fault, Path(folder))
            return original(*given, **named)

        setattr(place, name, patched)
    return main(rest)


@dataclass
class Run:
    """A faulty run of two ranks."""

    folder: Path
    launcher: subprocess.Popen[str]

    def processes(self) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.folder.glob("process-*"))]

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def line(self) -> str:
        """The one line that tells why it ended."""
        lines = re.findall(r"^error.*", self.said(), re.MULTILINE)
        assert len(lines) == 1, self.said()
        return str(lines[0])

    def seconds_to_end(self, rank: int, limit: float) -> float:
        """From the fault to the end of the process of ``rank``, which is no later than ``limit``."""
        deadline = time.time() + 60
        while not (self.folder / "struck").exists():
            assert self.launcher.poll() is None, self.said()
            assert time.time() < deadline, self.said()
            time.sleep(0.02)
        struck = float((self.folder / "struck").read_text() or time.time())
        while alive(self.processes()[rank]):
            assert time.time() < struck + limit, f"rank {rank} is alive after {limit} s:\n{self.said()}"
            time.sleep(0.02)
        return time.time() - struck


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@contextmanager
def struck_run(config: Path, fault: str, rank: int, step: int) -> Iterator[Run]:
    """Start it, and leave nothing of it behind."""
    folder = config.parent / "faulty"
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.pretrain.test_trainer_faults", str(folder), fault, str(rank), str(step), str(config)]
    with (folder / "said").open("w") as said:
        launcher = subprocess.Popen(command, cwd=REPOSITORY, env=ONE_THREAD, stdout=said, stderr=said, text=True)
    run = Run(folder, launcher)
    try:
        yield run
    finally:
        for process in [launcher.pid, *run.processes()]:
            if alive(process):
                os.kill(process, signal.SIGKILL)
        launcher.wait(60)


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    parallel = {"silence": SILENCE, "timeout": TIMEOUT}
    return write_config(tmp_path, corpus, {"checkpoint": {"every": 5}, "parallel": parallel})


@pytest.mark.drill
@pytest.mark.parametrize(
    ("fault", "rank", "step", "periods", "seconds", "words"),
    [
        ("kill", 1, 12, 9, 0, ["has not been heard of for", "in step 12 (step)", "killed"]),
        ("kill", 0, 12, 9, 0, ["has not been heard of for", "in step 12 (step)", "killed"]),
        ("kill", 1, 0, 9, 0, ["has not been heard of for", "last at start", "killed"]),
        ("freeze", 1, 12, 4, SILENCE, ["has not been heard of for", "in step 12 (step)", "froze"]),
        ("freeze", 0, 12, 4, SILENCE, ["has not been heard of for", "in step 12 (step)", "froze"]),
        ("hang", 1, 12, 4, TIMEOUT, ["no progress for", "in step 12 (step): the others wait for it"]),
        ("hang", 0, 12, 4, TIMEOUT, ["no progress for", "in step 12 (step): the others wait for it"]),
        ("raise", 1, 12, 5, 0, ["failed in step 12 (step): ValueError: a wire is loose"]),
    ],
)
def test_the_others_end_in_time_and_name_it(
    config: Path, fault: str, rank: int, step: int, periods: int, seconds: float, words: list[str]
) -> None:
    with struck_run(config, fault, rank, step) as run:
        took = run.seconds_to_end(1 - rank, periods * PERIOD + seconds + SLACK)
        struck = run.processes()[rank]
        if fault == "freeze":
            assert alive(struck), "it was frozen all the time"
            os.kill(struck, signal.SIGKILL)  # as torchrun does 30 s later
        assert run.launcher.wait(60) == 1
    assert took > seconds - PERIOD, "patience counts from the last beat, at most a period before the fault"
    line = run.line()
    print(f"{fault} of rank {rank} at step {step}: {took:.1f} s: {line}")
    assert f"error: rank {rank} of 2 (host " in line
    assert f"process {struck})" in line
    for word in words:
        assert word in line
    tracebacks = run.said().count('pretrain/trainer.py", line')  # torchrun's own has no such line
    assert (tracebacks > 0) == (fault == "raise"), run.said()

    steps = committed_steps(config.parent / "runs/small")
    assert steps == ([] if step == 0 else [5, 10])
    done = run_pretrain(config, ranks=2)
    assert done.returncode == 0, done.stderr
    assert ("going on after step 10" in done.stderr) == (step > 0)
    assert [record[0] for record in curve(config.parent / "runs/small")] == list(range(1, 21))


@pytest.mark.drill
def test_a_death_that_breaks_a_collective_need_not_wait_for_the_whole_silence(corpus: Path, tmp_path: Path) -> None:
    """With the defaults: torchrun, which notices the death too, kills the survivors after 30 s."""
    config = write_config(tmp_path, corpus)
    with struck_run(config, "kill", 1, 12) as run:
        took = run.seconds_to_end(0, 9 * period_of(30.0) + SLACK)
    print(f"with the defaults {took:.1f} s")
    assert "error: rank 1 of 2 (host " in run.line()


@pytest.mark.drill
@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_rank_is_left_alone(config: Path, rank: int) -> None:
    with struck_run(config, "slow", rank, 12) as run:
        assert run.launcher.wait(60) == 0, run.said()
    assert "error" not in run.said()
    assert "finished: step 20" in run.said()


@pytest.mark.drill
def test_ranks_do_not_outlive_their_store(config: Path) -> None:
    """Nor the first node, where it lives."""
    with struck_run(config, "orphan", 1, 12) as run:
        took = [run.seconds_to_end(rank, 2 * PERIOD + SILENCE + SLACK) for rank in (0, 1)]
    assert all(seconds > SILENCE for seconds in took)
    said = re.findall(r"^error: rank (\d) of 2 has had no answer from the rendezvous store", run.said(), re.MULTILINE)
    assert sorted(said) == ["0", "1"], run.said()


if __name__ == "__main__":
    sys.exit(faulty(sys.argv[1:]))
