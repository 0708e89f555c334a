"""launch/torchrun.sh on this machine, with real ranks: exit codes, what is printed, and every way to stop it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.runs import ONE_THREAD, REPOSITORY, committed_steps, metrics, write_config

TIMEOUT = 120  # seconds, for a start of torchrun and two ranks on a busy machine


def command(config: Path, *arguments: str, ranks: int) -> tuple[list[str], dict[str, str]]:
    environment = ONE_THREAD | {"LAUNCH_RANKS_PER_NODE": str(ranks), "LAUNCH_PYTHON": sys.executable}
    return ["bash", "launch/torchrun.sh", str(config), *arguments], environment


def launch(config: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    line, environment = command(config, *arguments, ranks=ranks)
    return subprocess.run(
        line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


class Started:
    """A launch that trains until it is told otherwise."""

    def __init__(self, process: subprocess.Popen[str], run: Path, steps: int) -> None:
        self.process, self.run = process, run
        path = run / "metrics.jsonl"
        self.until(lambda: path.exists() and len(path.read_bytes().splitlines()) > steps + 2)

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)

    def ends(self) -> tuple[int, str, str]:
        """Exit code, standard output and error. Every rank has ended with it."""
        out, error = self.process.communicate(timeout=TIMEOUT)
        assert "Traceback" not in error, error
        return self.process.returncode, out, error

    def rank(self, number: int) -> int:
        """Its process."""
        for child in children(self.process.pid):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in variables:
                return child
        raise AssertionError(f"no rank {number}")


@contextmanager
def started(config: Path, *arguments: str, ranks: int = 1) -> Iterator[Started]:
    """In a session of its own, as a terminal would have it, which is killed at the end."""
    run = config.parent / "runs/small"
    before = len(metrics(run)) if (run / "metrics.jsonl").exists() else 0
    line, environment = command(config, *arguments, ranks=ranks)
    process = subprocess.Popen(
        line,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Started(process, run, before)
    finally:
        ranks_left = children(process.pid) if process.poll() is None else []
        for pid in [process.pid, *ranks_left]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def newest_launch(run: Path) -> Path:
    return max((run / "launches").iterdir(), key=lambda path: path.stat().st_mtime)


def test_two_ranks_finish(corpus: Path, tmp_path: Path) -> None:
    """Under a name that no shell, no template of torchrun's and no log may read as anything but itself."""
    config = write_config(tmp_path, corpus)
    done = launch(config, "--name", 'it\'s "two"\n $HOME', ranks=2)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / 'it\'s "two" $HOME'
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"finished: step 20, val_loss \d\.\d{4}, val_bits_per_byte \d\.\d{4}, run .*", last)
    assert last.endswith(f", run {run}")
    assert done.stdout == last + "\n"
    assert "Traceback" not in done.stderr
    assert "world size 2" in done.stderr
    assert committed_steps(run) == [20]
    folder = newest_launch(run)
    word = json.loads((folder / "outcome.json").read_text())
    assert word == {"code": 0, "text": last, "step": 20, "reason": "no"}
    [first] = folder.glob("ranks/*/*/attempt_0/0/stdout.log")
    assert first.read_text() == done.stdout
    assert len(list(folder.glob("ranks/*/*/attempt_0/1/stderr.log"))) == 1, "what the other rank printed"


def test_a_mistake_is_answered_before_torchrun_starts(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    begin = time.monotonic()
    done = launch(config, "--model.deph", "3", ranks=2)
    took = time.monotonic() - begin
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command line: there is no key 'model.deph'; did you mean 'model.depth'?\n"
    assert not (tmp_path / "runs").exists()
    assert took < 30


def test_missing_data_is_one_line(corpus: Path, tmp_path: Path) -> None:
    """What only the ranks find out, and all of them: one says it, none is taken for a crash."""
    done = launch(write_config(tmp_path, corpus), "--data.path", "nowhere", ranks=2)
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "nowhere" in lines[0]


@pytest.mark.drill
def test_every_way_to_stop_it_and_to_go_on(corpus: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher, Ctrl-C to all its processes, the run's stop file: a checkpoint, and exit code 75."""
    config = write_config(tmp_path, corpus, {"train": {"steps": 100_000}})
    run = tmp_path / "runs/small"
    seen = 0
    for ranks, way in ((2, "SIGTERM"), (1, "SIGINT"), (1, "file")):
        with started(config, ranks=ranks) as one:
            if way == "SIGTERM":
                one.process.send_signal(signal.SIGTERM)
            elif way == "SIGINT":
                os.killpg(one.process.pid, signal.SIGINT)
            else:
                (run / "stop").touch()
            code, out, error = one.ends()
        assert code == 75, (way, error)
        [step] = committed_steps(run)[-1:]
        assert step > seen
        assert out == f"stopped: step {step} of 100000, run {run}\n"
        assert (f"going on after step {seen}" in error) == (seen > 0)
        word = json.loads((newest_launch(run) / "outcome.json").read_text())
        assert (word["code"], word["step"]) == (75, step)
        assert word["reason"] == ("file" if way == "file" else "signal")
        assert not (run / "stop").exists()
        seen = step


def test_two_interrupts_end_it_at_once(corpus: Path, tmp_path: Path) -> None:
    """To the launcher alone; a step takes so long that the first is not honoured yet."""
    config = write_config(tmp_path, corpus, {"train": {"steps": 100_000, "batch_tokens": 16_384}})
    with started(config) as one:
        rank = one.rank(0)
        for _ in range(2):
            one.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        code, out, error = one.ends()
        assert (code, out) == (130, "")
        assert error.splitlines()[-1].startswith("interrupted: ")
        assert not Path(f"/proc/{rank}").exists()


def test_a_rank_that_is_killed_is_named(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, {"train": {"steps": 100_000}, "parallel": {"silence": 5.0}})
    with started(config, ranks=2) as one:
        os.kill(one.rank(1), signal.SIGKILL)
        code, out, error = one.ends()
    assert (code, out) == (1, "")
    errors = [line for line in error.splitlines() if line.startswith("error: ")]
    assert any("rank 1" in line for line in errors), error
    assert errors[-1] == error.splitlines()[-1]
    assert "SIGKILL" in errors[-1]
    assert str(newest_launch(one.run)) in errors[-1]
    assert not (newest_launch(one.run) / "outcome.json").exists()
