"""Kill it at any moment, start it again: the run that comes out is, bit for bit, the uninterrupted one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain.__main__ import main
from tests.ranks import fork_server
from tests.runs import ONE_THREAD, REPOSITORY, checkpoint_tensors, committed_steps, curve, pretrain, write_config

KILLS = 20
LONG = {"train": {"steps": 500}, "checkpoint": {"every": 7}, "validate": {"every": 50}, "model": {"dropout": 0.1}}


def _train(arguments: list[str], errors: Path) -> None:
    """In a process of the fork server, where torch is imported already."""
    torch.set_num_threads(1)
    with errors.open("w") as stream:
        os.dup2(stream.fileno(), 2)
        sys.exit(main(arguments))


def _same_checkpoints(one: Path, other: Path) -> None:
    here, there = checkpoint_tensors(one), checkpoint_tensors(other)
    assert here.keys() == there.keys()
    assert any(name.startswith("optimizer.") for name in here)
    for name, tensor in here.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, there[name]), name


@pytest.mark.drill
@pytest.mark.parametrize(("optimizer", "asynchronous"), [("msgdw", False), ("adamw", True)])
def test_twenty_kills_leave_no_trace(corpus: Path, tmp_path: Path, optimizer: str, asynchronous: bool) -> None:
    update = {"optimizer": {"name": optimizer, "lr": 0.1 if optimizer == "msgdw" else 0.003}}
    config = write_config(tmp_path, corpus, LONG, update, {"checkpoint": {"asynchronous": asynchronous}})
    quiet, struck = tmp_path / "quiet/small", tmp_path / "struck/small"
    errors = tmp_path / "errors.txt"
    context = fork_server()

    def start(runs: Path):  # type: ignore[no-untyped-def]
        process = context.Process(target=_train, args=([str(config), "--runs_dir", str(runs)], errors))
        process.start()
        return process

    process = start(quiet.parent)
    process.join(120)
    assert process.exitcode == 0, errors.read_text()

    chance = random.Random(f"{optimizer} {asynchronous}")
    kills = 0
    for _ in range(3 * KILLS):
        before = committed_steps(struck) if struck.exists() else []
        errors.unlink(missing_ok=True)
        process = start(struck.parent)
        metrics = struck / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        deadline = time.monotonic() + 60
        # Anywhere between reading the configuration and some dozen steps on, checkpoints on the way.
        if chance.random() < 0.8:
            while process.is_alive() and time.monotonic() < deadline:
                if metrics.exists() and metrics.stat().st_size != size:
                    break
                time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.4))
        if kills < KILLS and process.is_alive():
            process.kill()
            process.join(60)
            kills += 1
        else:
            process.join(120)
        said = errors.read_text() if errors.exists() else ""
        gone_on = re.search(r"going on after step (\d+)", said)
        if gone_on:
            assert int(gone_on[1]) == before[-1], "only the newest committed checkpoint may be gone on from"
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, said
    assert kills == KILLS, "the run was over before it was killed often enough"
    assert process.exitcode == 0
    assert curve(struck) == curve(quiet)
    _same_checkpoints(struck / "checkpoints/step-00000500", quiet / "checkpoints/step-00000500")


@pytest.mark.drill
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_polite_signal_commits_and_exits_75(corpus: Path, tmp_path: Path, number: int, ranks: int) -> None:
    config = write_config(tmp_path, corpus, {"train": {"steps": 300}})
    run = tmp_path / "runs/small"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "pretrain", str(config)],
        cwd=REPOSITORY,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size < 2000:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in error or ranks > 1, error  # torchrun reports the signal that it got by a traceback
    if ranks == 1:
        assert process.returncode == 75, error
        assert out.startswith("stopped: step ")
    (step,) = committed_steps(run)
    assert 0 < step < 300
    assert pretrain(config, ranks=ranks).returncode == 0
    pretrain(config, "--runs_dir", str(tmp_path / "quiet"), ranks=ranks)
    assert curve(run) == curve(tmp_path / "quiet/small")


@pytest.mark.drill
def test_a_finished_run_is_reported_and_left_alone(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    first = pretrain(config)
    before = {path: path.read_bytes() for path in (tmp_path / "runs/small/checkpoints").rglob("*") if path.is_file()}
    lines = curve(tmp_path / "runs/small")
    second = pretrain(config)
    assert (first.returncode, second.returncode) == (0, 0)
    assert second.stdout == first.stdout
    assert second.stdout.splitlines()[-1].startswith("finished: step 20, val_loss ")
    assert curve(tmp_path / "runs/small") == lines
    assert {path: path.read_bytes() for path in before} == before
