"""Where a run stands, told from its folder alone: as a table, as JSON, and which state it is in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from launch import status as module
from launch.launches import Launch
from launch.status import main, status
from models.errors import ConfigError
from pretrain.cli import dump
from pretrain.config import RunConfig, TrainConfig
from pretrain.lock import FolderLock, Owner

NOBODY = 2**22 + 1  # above every pid_max


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of 20 steps, of which 12 are done and 10 are committed."""
    folder = tmp_path / "runs/small"
    (folder / "checkpoints/step-00000010").mkdir(parents=True)
    (folder / "checkpoints/step-00000005").mkdir()
    config = RunConfig(name="small", runs_dir=str(folder.parent), train=TrainConfig(steps=20))
    (folder / "config.yaml").write_text(dump(config))
    records = [
        {"step": 10, "loss": 5.5, "val_loss": 5.25, "val_bits_per_byte": 3.5, "tokens_per_second": 100.0, "mfu": 0.1},
        {"step": 12, "loss": 5.125, "tokens_per_second": 12345.6, "mfu": 0.25},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 13, "l')
    return folder


def owned(run: Path, number: int = 1, **changes: Any) -> None:
    owner = replace(Owner.here(30.0), **changes)
    (run / "owner").mkdir(exist_ok=True)
    (run / f"owner/{number:08d}.json").write_text(json.dumps(asdict(owner)))


def launched(run: Path, outcome: dict[str, Any] | None = None, **changes: Any) -> Launch:
    launch = replace(Launch(str(run), ["c.yaml"], "code", time.time(), 0, ["n1", "n2"], "71", 2), **changes)
    launch.create()
    if outcome is not None:
        (launch.folder / "outcome.json").write_text(json.dumps(outcome))
    return launch


STOPPED = {"code": 75, "text": "stopped: step 10 of 20", "reason": "file"}


def not_started(run: Path) -> None:
    launched(run, {"code": 2, "text": "no data"})


def released(run: Path) -> None:
    owned(run, released=True)


def killed(run: Path) -> None:
    owned(run, process=NOBODY)


def killed_far_away(run: Path) -> None:
    owned(run, machine="another boot")
    os.utime(run / "owner/00000001.json", (time.time() - 60, time.time() - 60))


def runs_far_away(run: Path) -> None:
    owned(run, machine="another boot")


def killed_in_a_launch(run: Path) -> None:
    launched(run, STOPPED, restart=1, began=1000.0)
    owned(run, process=NOBODY)
    launched(run)


def stopped_in_a_launch(run: Path) -> None:
    owned(run, released=True)
    launched(run, STOPPED)


def killed_after_a_launch_that_ended(run: Path) -> None:
    """Started again without a launcher."""
    launched(run, STOPPED, began=time.time() - 100)
    owned(run, 2, process=NOBODY)


def finished(run: Path) -> None:
    (run / "checkpoints/step-00000020").mkdir()
    owned(run, released=True)


@pytest.mark.parametrize(
    ("scene", "state"),
    [
        (not_started, "not started"),
        (released, "stopped"),
        (killed, "dead"),
        (killed_far_away, "dead"),
        (runs_far_away, "running"),
        (killed_in_a_launch, "dead"),
        (stopped_in_a_launch, "ended"),
        (killed_after_a_launch_that_ended, "dead"),
        (finished, "finished"),
    ],
)
def test_its_state(run: Path, scene: Callable[[Path], None], state: str) -> None:
    scene(run)
    assert status(run)["state"].split(":")[0] == state


def test_one_that_runs_here(run: Path) -> None:
    lock = FolderLock(run, silence=30.0)
    lock.acquire()
    try:
        assert status(run)["state"] == "running"
    finally:
        lock.release()
    assert status(run)["state"] == "stopped"


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    assert "state      not started\n" in capsys.readouterr().out
    assert status(tmp_path)["step"] == 0


def test_for_a_program(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "job_state", lambda job: f"RUNNING {job}'s reason")
    owned(run, process=NOBODY, host="far", job="71")
    launched(run, STOPPED, restart=0, began=1000.0)
    launch = launched(run, restart=1)
    for attempt in ("a", "b"):
        log = launch.folder / f"ranks/n1/{attempt}/attempt_0/0/stderr.log"
        log.parent.mkdir(parents=True)
        log.touch()
    (launch.folder / "ranks/n2/c/attempt_0/0").mkdir(parents=True)
    (launch.folder / "ranks/n2/c/attempt_0/0/stderr.log").touch()
    (run / "save").touch()
    assert main([str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == status(run)
    expected = {
        "run": str(run),
        "step": 12,
        "steps": 20,
        "loss": 5.125,
        "val_loss": 5.25,
        "val_bits_per_byte": 3.5,
        "tokens_per_second": 12345.6,
        "mfu": 0.25,
        "logged": (run / "metrics.jsonl").stat().st_mtime,
        "committed": 10,
        "committed_at": (run / "checkpoints/step-00000010").stat().st_mtime,
        "job": "71 RUNNING 71's reason",
        "nodes": ["n1", "n2"],
        "launches": 2,
        "requeued": 1,
        "last_word": None,
        "log": str(log),
        "asked": ["save"],
    }
    assert {key: found[key] for key in expected} == expected
    assert found["owner"].startswith(f"host far, process {NOBODY}, SLURM job 71, since ")


def test_for_a_person(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what is not known there is no line."""
    owned(run, released=True)
    os.utime(run / "metrics.jsonl", (time.time() - 3725, time.time() - 3725))
    (run / "stop").touch()
    (run / "save").touch()
    assert main([str(run)]) == 0
    lines = {line[:11].strip(): line[11:] for line in capsys.readouterr().out.splitlines()}
    assert lines.pop("owner").startswith(f"host {os.uname().nodename}, process {os.getpid()}, since ")
    assert lines.pop("checkpoint").startswith("step 10, 0:00:0")
    assert lines.pop("step") in ("12 of 20, 1:02:05 ago", "12 of 20, 1:02:06 ago")
    assert lines == {
        "run": str(run),
        "state": "stopped, stop and save asked for",
        "loss": "5.1250, validation 5.2500, 3.500 bits/byte",
        "speed": "12,346 tokens/s",
    }


def test_it_changes_nothing(run: Path) -> None:
    killed_in_a_launch(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    status(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_path_that_is_none_names_the_nearest(run: Path) -> None:
    (run.parent / "other").mkdir()
    with pytest.raises(ConfigError, match=rf"no run's folder .*/smal; did you mean '{run}'\?"):
        main([str(run.parent / "smal")])
    with pytest.raises(ConfigError, match=r"no run's folder .*/nowhere/small$"):
        main([str(run.parent / "nowhere/small")])
    with pytest.raises(ConfigError, match=r"no run's folder"):
        main([str(run / "config.yaml")])


def test_without_slurm_there_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert module.job_state("71") == "?"


@pytest.mark.parametrize(
    ("script", "state"),
    [("echo \"$*\" >&2; echo 'RUNNING n[1-2]'", "RUNNING n[1-2]"), ("echo 'Invalid job id' >&2; exit 1", "?")],
)
def test_slurm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: str) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{script}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert module.job_state("71") == state
