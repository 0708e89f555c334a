"""Whole runs with bf16 optimizer state, through a checkpoint on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import checkpoint_tensors, curve, pretrain, write_config


@pytest.mark.drill
@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        ({"name": "msgdw", "lr": 0.1}, ("momentum_buffer",)),
        ({"name": "adamw", "lr": 0.003}, ("exp_avg", "exp_avg_sq")),
    ],
    ids=["msgdw", "adamw"],
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
