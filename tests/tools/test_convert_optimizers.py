"""State of Lion, SGD-SaI and Muon: there and back, and a fresh one as the optimizer itself makes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from models import ModelConfig
from models.errors import ConfigError
from pretrain.config import MuonConfig, OptimizerConfig
from pretrain.engines import build_engine
from tests.models.building import build
from tests.pretrain.engine_runs import here
from tests.runs import checkpoint_tensors
from tests.tools.converting import assert_bitwise, run_convert, stepped, tensors_of, write_run
from tools.formats import optimizer as states
from tools.formats.lazy import LazyTensor
from tools.formats.weights import run_config

MODEL = ModelConfig(plan="dyt", width=8, depth=2, heads=2, ffn_width=12, vocab_size=13, context=8)
OPTIMIZERS = {
    "lion": OptimizerConfig(name="lion", lr=1e-3),
    "sgd-sai": OptimizerConfig(name="sgd-sai", lr=1e-4, state_dtype="bf16"),
    "muon": OptimizerConfig(name="muon", lr=1e-2, weight_decay=0.1),
    "muon, msgdw": OptimizerConfig(name="muon", lr=1e-2, muon=MuonConfig(others="msgdw"), state_dtype="bf16"),
}


def plain_values(run: Path) -> dict[str, Any]:
    (checkpoint,) = (run / "checkpoints").iterdir()
    return {name: v for name, v in checkpoint_tensors(checkpoint).items() if not isinstance(v, Tensor)}


@pytest.mark.parametrize(
    ("key", "there"),
    [*((key, there) for key in OPTIMIZERS for there in ("torch", "safetensors", "native")), ("lion", "deepspeed")],
)
def test_it_comes_back(there: str, key: str, tmp_path: Path) -> None:
    state = stepped(build(MODEL), OPTIMIZERS[key])
    write_run(tmp_path / "run", MODEL, optimizer=(OPTIMIZERS[key], state))
    run_convert(tmp_path / "run", tmp_path / "there", there, "--optimizer")
    run_convert(tmp_path / "there", tmp_path / "back", "native", "--optimizer", "--allow-pickle")
    assert_bitwise(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "run"))
    assert plain_values(tmp_path / "back") == plain_values(tmp_path / "run") != {}


@pytest.mark.parametrize("key", OPTIMIZERS)
def test_a_fresh_one_is_what_an_engine_begins_with(key: str) -> None:
    config = replace(run_config(MODEL), optimizer=OPTIMIZERS[key], device="cpu")
    engine = build_engine(config, here())
    engine.initialize()
    expected, made = engine.tensors()["optimizer"], states.fresh(config)
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert isinstance(made[name], LazyTensor)
            assert (tuple(made[name].shape), made[name].dtype) == (tuple(value.shape), value.dtype), name
            # torch counts the step that made the engine's state
            assert made[name].read().equal(value - 1 if name.endswith(".step") else value), name
        else:
            assert made[name] == value, name
    states.check(made, config)


@pytest.mark.parametrize("key", ["sgd-sai", "muon"])
def test_what_zero_cannot_hold_is_refused(key: str, tmp_path: Path) -> None:
    state = stepped(build(MODEL), OPTIMIZERS[key])
    write_run(tmp_path / "run", MODEL, optimizer=(OPTIMIZERS[key], state))
    with pytest.raises(ConfigError, match="leave --optimizer out"):
        run_convert(tmp_path / "run", tmp_path / "there", "deepspeed", "--optimizer")
    run_convert(tmp_path / "run", tmp_path / "there", "deepspeed")
