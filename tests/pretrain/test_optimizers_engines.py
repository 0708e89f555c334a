"""Lion, Muon and SGD-SaI under the engines: one loss whatever shares the work, checkpoints that go from one to another,
refusals where there can be none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from models.errors import ConfigError
from pretrain.config import MuonConfig, RunConfig
from pretrain.engines import build_engine
from pretrain.planning.layout import moments_bytes
from pretrain.planning.sizes import measure
from tests.pretrain.engine_runs import advance, config_of, here, train_all
from tests.pretrain.test_engine_elastic import CONTINUED, SAVED, proceed, save
from tests.ranks import run_ranks

Cells = dict[tuple[str, str], RunConfig]

# fp32 as in test_engine_parity.py. Muon rounds an update to bf16 (2^-9) before it iterates, and the iteration raises
# what is small in it: where another order of sums makes it round the other way, elements of a step, 1e-2 or less, move
# by that. A momentum in bf16 keeps such a difference for the next steps.
TOLERANCES = {("dyt", "lion"): 1e-5, ("dyt", "sgd-sai"): 1e-5, ("dyt", "muon"): 2e-4, ("dnt", "muon"): 2**-9}
STEPS = 6

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "replicate": {"parallel": {"shard": "replicate"}},
    "offloaded": {"parallel": {"cpu_offload": True}},
    "ZeRO-0": {"parallel": {"engine": "deepspeed", "zero_stage": 0}},
    "ZeRO-3": {"parallel": {"engine": "deepspeed", "zero_stage": 3}},
}


def cells(**sections: dict[str, Any]) -> Cells:
    """By (plan, optimizer); the second muon moves the other roles by mSGDW, and keeps its momentum in bf16."""
    found = {("dyt", name): config_of("dyt", name, **sections) for name in ("lion", "sgd-sai", "muon")}
    muon = config_of("dnt", "muon", **sections)
    rounded = {"state_dtype": "bf16", "state_rounding": "nearest"}
    found["dnt", "muon"] = replace(
        muon, optimizer=replace(muon.optimizer, muon=MuonConfig(others="msgdw", others_lr=0.1), **rounded)
    )
    return found


def possible(mode: str) -> Cells:
    return {key: config for key, config in cells(**MODES[mode]).items() if mode != "ZeRO-3" or key[1] == "lion"}


def on_ranks(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode in MODES:
        found[mode] = train_all(possible(mode), STEPS)
    for mode in ("full", "ZeRO-0"):
        found[f"{mode}, saved"] = save(possible(mode), folder / mode)
        found[f"{mode}, gone on"] = proceed(possible(mode), folder / "alone")
    return found


def assert_close(found: dict[Any, Any], expected: dict[Any, Any], what: str) -> None:
    for key, steps in found.items():
        assert steps == [pytest.approx(step, rel=TOLERANCES[key]) for step in expected[key]], (what, key)


@pytest.mark.drill
def test_whatever_shares_the_work_there_is_one_loss(tmp_path: Path) -> None:
    """And a checkpoint of one process goes on under two ranks, whole or sharded, and theirs in one process."""
    expected = train_all(cells(), STEPS)
    straight = train_all(cells(), SAVED + CONTINUED)
    after = {key: losses[SAVED:] for key, losses in straight.items()}
    assert save(cells(), tmp_path / "alone") == after
    for found in run_ranks(on_ranks, 2, tmp_path, timeout=280):
        for mode in MODES:
            assert set(found[mode]) == set(possible(mode))
            assert_close(found[mode], expected, mode)
        for mode in ("full", "ZeRO-0"):
            assert_close(found[f"{mode}, saved"], after, mode)
            assert_close(found[f"{mode}, gone on"], after, mode)
    for mode in ("full", "ZeRO-0"):
        assert_close(proceed(cells(), tmp_path / mode), after, mode)
        # The state matters to the losses that follow.
        with pytest.raises(AssertionError):
            assert_close(proceed(cells(), tmp_path / mode, loses_state=True), after, mode)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("key", [("dyt", "lion"), ("dyt", "sgd-sai"), ("dyt", "muon"), ("dnt", "muon")])
def test_a_plan_counts_the_moments_that_are_there(key: tuple[str, str], dtype: Any) -> None:
    config = cells()[key]
    config = replace(config, optimizer=replace(config.optimizer, state_dtype=dtype))
    state = build_engine(config, here()).tensors()["optimizer"]
    held = sum(value.nbytes for value in state.values() if isinstance(value, Tensor) and value.dim())
    sizes = measure(config.model, 1)
    assert moments_bytes(config, sizes) * sizes.parameters == pytest.approx(held)


def test_eight_bits() -> None:
    """Of linears whose products run in 8 bits, the optimizer has the fp32 weights."""
    for name in ("lion", "muon", "sgd-sai"):
        config = config_of("dyt", name, precision={"fp8": "tensorwise", "compute": "bf16"})
        engine = build_engine(config, here())
        engine.initialize()
        first, *_, last = (loss for loss, _ in advance(engine, config, range(STEPS)))
        assert last < first


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["muon", "sgd-sai"])
def test_flat_partitions_are_refused(name: str, stage: int) -> None:
    config = config_of("dyt", name, parallel={"engine": "deepspeed", "zero_stage": stage})
    with pytest.raises(ConfigError, match=r"--parallel\.engine fsdp, or --parallel\.zero_stage 0") as error:
        build_engine(config, here())
    assert "\n" not in str(error.value)
