"""Wrong input: one clear line, exit code 2, nothing lost."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.__main__ import main
from pretrain.engines.fsdp import FSDPEngine
from pretrain.lock import FolderLock
from tests.runs import committed_steps, pretrain, write_config


def _fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that ``main`` says, with exit code 2; the line has no traceback before it."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said.err
    assert said.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in said.err
    return lines[0]


MISTAKES: list[tuple[list[str], list[str]]] = [
    (["--optimizer.learning_rate", "0.1"], ["optimizer.learning_rate", "optimizer.lr"]),
    (["--model.deph", "3"], ["model.deph", "model.depth"]),
    (["--optimizer.lr", "fast"], ["optimizer.lr", "'fast'", "number"]),
    (["--model.depth", "2.5"], ["model.depth", "whole number"]),
    (["--optimizer.name", "sgd"], ["optimizer.name", "'sgd'", "msgdw | adamw"]),
    (["--model.plan", "dntt"], ["'dntt'", "'dnt'"]),
    (["--model.sites", "{attn_inn: rmsnorm}"], ["attn_inn", "attn_in"]),
    (["--model.sites", "{attn_in: rmsnrm}"], ["rmsnrm", "rmsnorm"]),
    (["--model.vocab_size", "5000"], ["5000", "larger", "512"]),
    (["--model.vocab_size", "100"], ["100", "smaller", "512"]),
    (["--data.sequence_length", "64"], ["data.sequence_length 64", "model.context 32"]),
    (["--data.path", "nowhere"], ["nowhere", "tools.prepare"]),
    (["--train.batch_tokens", "500"], ["train.batch_tokens 500", "512"]),
    (["--train.micro_batch", "5"], ["train.micro_batch 5", "write 4"]),
    (["--schedule.warmup_steps", "30"], ["schedule.warmup_steps", "20"]),
    (["--optimizer.lr_factors", "{alpha: 0.1}"], ["alpha"]),
    (["--optimizer.lr", "-1"], ["optimizer.lr", "-1"]),
    (["--device", "cuda"], ["cuda"]),
    (["--model.init.std", "-1"], ["model.init.std", "positive"]),
    (["--model.alpha.rule", "measured"], ["measured", "'dnt'"]),
    (["--name", "../elsewhere"], ["'../elsewhere'"]),
    (["--log.every", "-1"], ["log.every", "-1"]),
    (["--train.tokens", "1000"], ["train.steps", "train.tokens"]),
    (["--optimizer.lr"], ["--optimizer.lr"]),
    (["optimizer.lr", "1"], ["optimizer.lr"]),
]


@pytest.mark.parametrize(("arguments", "names"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_is_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], names: list[str]
) -> None:
    config = write_config(tmp_path, corpus)
    line = _fails([str(config), *arguments], capsys)
    for name in names:
        assert name in line
    assert not (tmp_path / "runs").exists(), "a run that cannot start leaves no folder"


def test_missing_and_broken_files(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, corpus)
    assert "run.yaml" in _fails([str(tmp_path / "rum.yaml")], capsys)
    config.write_text("train: {steps: 3")
    assert "not valid YAML" in _fails([str(config)], capsys)
    config.write_text("- a list\n")
    assert "keys and values" in _fails([str(config)], capsys)


def test_exit_code_of_the_command(corpus: Path, tmp_path: Path) -> None:
    done = pretrain(write_config(tmp_path, corpus), "--model.deph", "3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_a_corrupted_shard_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "prepared"
    shutil.copytree(corpus, damaged)
    shard = next(damaged.glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    line = _fails([str(write_config(tmp_path, damaged))], capsys)
    assert shard.name in line
    assert "tools.prepare" in line


def _overrides(**sections: dict[str, Any]) -> list[str]:
    return [part for section, keys in sections.items() for key, value in keys.items()
            for part in (f"--{section}.{key}", str(value))]  # fmt: skip


def test_another_configuration_in_the_same_folder(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, corpus)
    assert main([str(config)]) == 0
    line = _fails([str(config), *_overrides(optimizer={"lr": 0.05})], capsys)
    assert "optimizer.lr 0.1, not 0.05" in line
    assert "--name" in line
    # What changes only where and how fast it trains is no other run.
    assert main([str(config), *_overrides(train={"micro_batch": 4}, log={"every": 5})]) == 0
    assert committed_steps(tmp_path / "runs/small") == [20]


def test_a_checkpoint_of_another_architecture(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    wide.mkdir()
    narrow.mkdir()
    config = write_config(narrow, corpus)
    assert main([str(write_config(wide, corpus, {"model": {"width": 64}}))]) == 0
    shutil.copytree(wide / "runs/small/checkpoints", narrow / "runs/small/checkpoints")
    line = _fails([str(config)], capsys)
    assert "architecture" in line
    assert "(512, 64)" in line
    assert "(512, 32)" in line
    assert committed_steps(narrow / "runs/small") == [20]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, corpus, {"checkpoint": {"every": 10}})
    assert main([str(config)]) == 0
    first = capsys.readouterr()
    newest = tmp_path / "runs/small/checkpoints/step-00000020"
    shard = next(newest.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = pretrain(config)
    assert done.returncode == 0
    assert f"{newest.name}" in done.stderr
    assert "going on after step 10" in done.stderr
    assert done.stdout.splitlines()[-1] == first.out.splitlines()[-1]


def test_a_full_disk_while_saving(corpus: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        config = write_config(tmp_path, corpus, {"checkpoint": {"every": 5, "keep": 3}})
        done = pretrain(config, "--runs_dir", str(disk))
        assert done.returncode == 2, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ")
        assert "space" in last
        assert "Traceback" not in done.stderr
        kept = committed_steps(disk / "small")
        assert kept, "the checkpoints before the full disk stay"
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True, capture_output=True)
        done = pretrain(config, "--runs_dir", str(disk))
        assert done.returncode == 0, done.stderr
        assert f"going on after step {kept[-1]}" in done.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_processes_do_not_train_one_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, corpus)
    run = tmp_path / "runs/small"
    run.mkdir(parents=True)
    lock = FolderLock(run, silence=30.0)
    lock.acquire()
    try:
        assert "another process trains" in _fails([str(config)], capsys)
    finally:
        lock.release()
    assert main([str(config)]) == 0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_never_committed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    """One bad gradient between two logged steps: the loss before the update is still finite."""
    original = FSDPEngine.step
    steps = itertools.count(1)

    def step(engine: FSDPEngine, lr: float) -> torch.Tensor:
        if next(steps) == 10:
            next(engine.model.parameters()).grad[0, 0] = value  # type: ignore[index]
        return original(engine, lr)

    monkeypatch.setattr(FSDPEngine, "step", step)
    config = write_config(tmp_path, corpus, {"checkpoint": {"every": 5}, "log": {"every": 1000}})
    assert main([str(config)]) == 3
    assert "gradient norm" in capsys.readouterr().err
    assert committed_steps(tmp_path / "runs/small") == [5]


def test_a_diverged_run_says_so_and_keeps_its_checkpoints(corpus: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, corpus, {"optimizer": {"lr": 1e30}, "train": {"clip": None}, "schedule": {"warmup_steps": 0}}
    )
    done = pretrain(config)
    assert done.returncode == 3
    assert "the loss is" in done.stderr
    assert "Traceback" not in done.stderr
    assert committed_steps(tmp_path / "runs/small") == []


def test_help_names_every_key() -> None:
    from pretrain.cli import KEYS

    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    for key in KEYS:
        assert f"--{key} " in done.stdout
