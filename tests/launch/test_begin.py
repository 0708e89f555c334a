"""A launch that begins is written down once, and what keeps it from that is one line."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from launch.__main__ import main as launch_main
from launch.begin import begin, main
from launch.launches import Launch, committed_step, launches_of, read
from models.errors import ConfigError
from pretrain.cli import dump
from pretrain.config import RunConfig, TrainConfig


def config(folder: Path, name: str = "small") -> RunConfig:
    return RunConfig(name=name, runs_dir=str(folder / "runs"), train=TrainConfig(steps=20))


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """As launch freeze leaves it."""
    folder = tmp_path / "frozen"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config(tmp_path)))
    return folder


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "runs/small/checkpoints/step-00000120").mkdir(parents=True)
    (tmp_path / "runs/small/checkpoints/step-00000040").mkdir(parents=True)
    before = time.time()
    launch = begin(config(tmp_path), ["a b.yaml", "--name", "x\ny"], tmp_path / "code", ["n1", "n2"], "71", 3)
    assert before <= launch.began <= time.time()
    assert launch == Launch(
        str(tmp_path / "runs/small"),
        ["a b.yaml", "--name", "x\ny"],
        str(tmp_path / "code"),
        launch.began,
        120,
        ["n1", "n2"],
        "71",
        3,
    )
    assert launch.folder == tmp_path / "runs/small/launches/71.3"
    assert read(launch.folder) == launch
    assert launch.outcome is None
    launch.ask_to_stop("because")
    assert (launch.folder / "stop").read_text() == "because\n"
    (launch.folder / "outcome.json").write_text(json.dumps({"code": 0, "text": "finished"}))
    assert launch.outcome == {"code": 0, "text": "finished"}


def test_on_one_machine_a_launch_is_called_by_its_time(tmp_path: Path) -> None:
    launch = begin(config(tmp_path), [], tmp_path, ["here"])
    assert re.fullmatch(r"local-\d{8}-\d{6}\.\d{3,4}", launch.folder.name)
    stamp = time.strptime(launch.folder.name[:21], "local-%Y%m%d-%H%M%S")
    assert time.mktime(stamp) == int(launch.began)


def test_one_that_is_there_already_is_nobody_s_to_overwrite(tmp_path: Path) -> None:
    first = begin(config(tmp_path), [], tmp_path, ["n1"], "71", 0)
    before = (first.folder / "launch.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"{first.folder} is there already: .*rename that folder"):
        begin(config(tmp_path), ["other"], tmp_path, ["n2"], "71", 0)
    assert (first.folder / "launch.json").read_bytes() == before
    second = begin(config(tmp_path), [], tmp_path, ["n1"], "71", 1)
    assert launches_of(tmp_path / "runs/small") == [first, second]


@pytest.mark.parametrize("file", ["runs", "runs/small", "runs/small/launches"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ConfigError, match=r"cannot write the run's folder .*runs/small: Not a directory"):
        begin(config(tmp_path), [], tmp_path, [])


def test_launches_are_in_the_order_of_their_time(tmp_path: Path) -> None:
    every = [
        Launch(str(tmp_path), [], "code", when, 0, [], job, 0) for job, when in (("9", 1.0), ("10", 2.0), ("8", 3.0))
    ]
    for launch in reversed(every):
        launch.create()
    (tmp_path / "launches/torn").mkdir()  # killed before it was written down
    assert launches_of(tmp_path) == every
    assert launches_of(tmp_path / "nowhere") == []


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    from pretrain.checkpoint import commit

    assert committed_step(tmp_path) == 0
    folder = tmp_path / "checkpoints"
    commit.committed_path(folder, 7).mkdir(parents=True)
    commit.partial_path(folder, 9).mkdir(parents=True)
    assert committed_step(tmp_path) == 7


def test_in_a_job(
    tmp_path: Path, frozen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert main([str(frozen), "--nodes", "n1", "n2"]) == 0
    folder = Path(capsys.readouterr().out.removesuffix("\n"))
    assert folder == tmp_path / "runs/small/launches/71.2"
    launch = read(folder)
    assert launch.arguments == [str(frozen / "config.yaml")]
    assert (launch.code, launch.nodes) == (str(frozen / "code"), ["n1", "n2"])
    monkeypatch.delenv("SLURM_RESTART_COUNT")  # as SLURM has it at a job's first start
    assert main([str(frozen)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/runs/small/launches/71.0\n"


def test_a_folder_that_was_not_frozen(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.yaml: name a folder that launch freeze printed"):
        main([str(tmp_path)])


def test_outside_a_job_it_is_a_mistake(frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError):
        main([str(frozen)])


@pytest.mark.parametrize("command", ["begin", "decide", "health", "node", "status"])
def test_what_is_missing_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_main([command]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(
        rf"error: the following arguments are required: .*; see python -m launch {command} --help\n", said.err
    )
