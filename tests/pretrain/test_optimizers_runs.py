"""Whole runs of every optimizer, through a checkpoint on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.__main__ import main
from tests.runs import checkpoint_tensors, curve, metrics, pretrain, write_config


@pytest.mark.drill
@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        ({"name": "msgdw", "lr": 0.1}, ("momentum_buffer",)),
        ({"name": "adamw", "lr": 0.003}, ("exp_avg", "exp_avg_sq")),
        ({"name": "muon", "lr": 0.01}, ("momentum_buffer", "exp_avg", "exp_avg_sq")),
    ],
    ids=["msgdw", "adamw", "muon"],
)
def test_a_run_that_goes_on_from_its_checkpoint_is_the_uninterrupted_one(
    corpus: Path, tmp_path: Path, optimizer: dict[str, Any], moments: tuple[str, ...]
) -> None:
    config = write_config(
        tmp_path, corpus, {"optimizer": optimizer | {"state_dtype": "bf16"}, "checkpoint": {"every": 10}}
    )
    whole, part = tmp_path / "runs/small", tmp_path / "part/small"
    done = pretrain(config, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "stored in bf16 rounded stochastically" in done.stderr
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints/step-00000020")
    done = pretrain(config, "--runs_dir", str(part.parent), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "going on after step 10" in done.stderr
    assert curve(part) == curve(whole)
    there, here = (checkpoint_tensors(run / "checkpoints/step-00000020") for run in (whole, part))
    tensors = {key: value for key, value in there.items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(here[key], value) for key, value in tensors.items())
    stored = [value.dtype for key, value in tensors.items() if key.endswith(moments)]
    assert stored
    assert set(stored) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        ({"name": "lion", "lr": 0.001}, {"exp_avg"}),
        ({"name": "sgd-sai", "lr": 1e-4}, {"momentum_buffer", "gsnr"}),
        ({"name": "muon", "lr": 0.01}, {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}),
        ({"name": "muon", "lr": 0.01, "muon": {"others": "msgdw", "others_lr": 0.1}}, {"momentum_buffer"}),
    ],
    ids=["lion", "sgd-sai", "muon", "muon, msgdw"],
)
def test_it_learns_and_goes_on_bit_for_bit(
    corpus: Path, tmp_path: Path, optimizer: dict[str, Any], state: set[str], dtype: str
) -> None:
    settings = {"model": {"plan": "dyt", "init": {"std": "fan_in"}}, "train": {"steps": 8}, "checkpoint": {"every": 4}}
    config = write_config(tmp_path, corpus, settings, {"optimizer": optimizer | {"state_dtype": dtype}})
    assert main([str(config)]) == 0
    whole, part = tmp_path / "runs/small", tmp_path / "part/small"
    first, *_, last = metrics(whole)
    assert last["loss"] < first["loss"]
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints/step-00000008")
    assert main([str(config), "--runs_dir", str(part.parent)]) == 0
    assert curve(part) == curve(whole)
    there, here = (checkpoint_tensors(run / "checkpoints/step-00000008") for run in (whole, part))
    tensors = {key: value for key, value in there.items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(here[key], value) for key, value in tensors.items())
    assert {key.rpartition(".")[2] for key in tensors if key.startswith("optimizer.state.")} == state
