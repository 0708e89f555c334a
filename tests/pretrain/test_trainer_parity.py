"""One process and many train the same: the promise of `torchrun` in the README."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runs import curve, metrics, pretrain, write_config

# fp32 sums in another order: a relative 1e-7 an operation, amplified over 20 steps of training. Measured: below 1e-5.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["dnt", "dyt"])
def reference(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process, with its configuration beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(folder, corpus, {"model": {"plan": request.param}})
    done = pretrain(config)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.drill
@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 8), (2, 4), (4, 2)])
def test_losses_and_norms_agree_with_one_process(reference: Path, tmp_path: Path, ranks: int, micro_batch: int) -> None:
    done = pretrain(
        reference / "run.yaml", "--runs_dir", str(tmp_path), "--train.micro_batch", str(micro_batch), ranks=ranks
    )
    assert done.returncode == 0, done.stderr
    alone, together = metrics(reference / "runs/small"), metrics(tmp_path / "small")
    assert len(alone) == len(together) == 20
    for one, many in zip(alone, together, strict=True):
        assert many["batch_hash"] == one["batch_hash"]
        assert many["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=TOLERANCE)
    assert together[-1]["val_loss"] == pytest.approx(alone[-1]["val_loss"], rel=TOLERANCE)


@pytest.mark.drill
@pytest.mark.parametrize("optimizer", ["msgdw", "adamw"])
def test_saved_under_four_ranks_goes_on_under_one_and_two(corpus: Path, tmp_path: Path, optimizer: str) -> None:
    lr = 0.1 if optimizer == "msgdw" else 0.003
    config = write_config(tmp_path, corpus, {"optimizer": {"name": optimizer, "lr": lr}, "checkpoint": {"every": 10}})
    whole = tmp_path / "runs/small"
    done = pretrain(config, ranks=4)
    assert done.returncode == 0, done.stderr
    for ranks in (1, 2):
        part = tmp_path / f"under{ranks}" / "small"
        shutil.copytree(whole, part)
        shutil.rmtree(part / "checkpoints/step-00000020")
        done = pretrain(config, "--runs_dir", str(part.parent), ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "going on after step 10" in done.stderr
        assert [line[5] for line in curve(part)] == [line[5] for line in curve(whole)]  # the token stream
        for there, here in zip(metrics(whole)[10:], metrics(part)[10:], strict=True):
            assert here["loss"] == pytest.approx(there["loss"], rel=TOLERANCE)
            assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=TOLERANCE)


ZERO = ("--parallel.engine", "deepspeed", "--parallel.zero_stage")


@pytest.mark.drill
def test_a_run_changes_its_engine_on_the_way(corpus: Path, tmp_path: Path) -> None:
    """ZeRO-3 on 2 ranks to step 20, FSDP2 in one process to 40, ZeRO-1 on 2 from there on: data order, losses
    and norms of one run. The folder says what DeepSpeed was told while it is DeepSpeed that trains."""
    config = write_config(tmp_path, corpus, {"model": {"plan": "dyt"}, "train": {"steps": 60}})
    done = pretrain(config, "--name", "whole")
    assert done.returncode == 0, done.stderr
    run, whole = tmp_path / "runs/small", metrics(tmp_path / "runs/whole")
    stages: list[tuple[int, int, tuple[str, ...]]] = [(20, 2, (*ZERO, "3")), (40, 1, ()), (60, 2, (*ZERO, "1"))]
    for until, ranks, engine in stages:
        done = pretrain(config, "--checkpoint.every", "20", "--checkpoint.keep", "3", *engine, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert (run / "deepspeed.json").exists() == bool(engine)
        if engine:
            assert f"deepspeed: ZeRO stage {engine[-1]}" in done.stderr
        if until > 20:
            assert f"going on after step {until - 20}" in done.stderr
        found = metrics(run)
        assert [line["batch_hash"] for line in found] == [line["batch_hash"] for line in whole]
        for one, here in zip(whole, found, strict=True):
            assert here["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
            assert here["grad_norm"] == pytest.approx(one["grad_norm"], rel=TOLERANCE)
        for later in range(until + 20, 61, 20):  # as if it had been stopped there
            shutil.rmtree(run / f"checkpoints/step-{later:08}")
