"""Saved under one engine, stage and world size, gone on with under another: weights, optimizer state, data order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint import Checkpointer
from pretrain.config import RunConfig
from pretrain.engines import build_engine
from tests.pretrain.engine_runs import advance, config_of, here
from tests.ranks import run_ranks

SAVED, CONTINUED = 5, 5  # steps before and after the checkpoint
TOLERANCE = 1e-5  # fp32 sums in another order; the largest difference seen is 3e-7

SAVERS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP2 on 4": (4, {"engine": "fsdp"}),
    "ZeRO-1 on 2": (2, {"engine": "deepspeed", "zero_stage": 1}),
    "ZeRO-3 on 2": (2, {"engine": "deepspeed", "zero_stage": 3}),
}
LOADERS: dict[str, tuple[int, dict[str, Any], int]] = {  # ranks, parallel, micro-batch
    "FSDP2 on 1": (1, {"engine": "fsdp"}, 8),
    "FSDP2 on 2": (2, {"engine": "fsdp"}, 2),
    "ZeRO-2 on 2": (2, {"engine": "deepspeed", "zero_stage": 2}, 1),
    "ZeRO-3 on 2": (2, {"engine": "deepspeed", "zero_stage": 3}, 4),
    "ZeRO-0 on 1": (1, {"engine": "deepspeed", "zero_stage": 0}, 4),
}
CELLS = [("dyt", "adamw"), ("dyt", "msgdw")]  # with alphas, of which most ranks hold nothing


def cell(folder: Path, plan: str, optimizer: str) -> Path:
    return folder / f"{plan}-{optimizer}"


def checkpointer(folder: Path) -> Checkpointer:
    return Checkpointer(folder, keep=1, keep_every=None, group=dist.group.WORLD if dist.is_initialized() else None)


def save(configs: dict[tuple[str, str], RunConfig], folder: Path) -> dict[tuple[str, str], Any]:
    """Train the first steps of every cell, commit, and go on: the losses after the checkpoint, by cell."""
    losses = {}
    for (plan, optimizer), config in configs.items():
        engine = build_engine(config, here())
        engine.initialize()
        advance(engine, config, range(SAVED))
        checkpointer(cell(folder, plan, optimizer)).save(SAVED, engine.tensors(), {}, {})
        losses[plan, optimizer] = advance(engine, config, range(SAVED, SAVED + CONTINUED))
    return losses


def proceed(
    configs: dict[tuple[str, str], RunConfig], folder: Path, loses_state: bool = False
) -> dict[tuple[str, str], Any]:
    """Load every cell's checkpoint into a fresh engine and train the next steps, with the optimizer's moments dropped
    on the way if ``loses_state``."""
    losses = {}
    for (plan, optimizer), config in configs.items():
        engine = build_engine(config, here())
        loader = checkpointer(cell(folder, plan, optimizer))
        committed = loader.latest()
        assert committed is not None
        tensors = engine.tensors()
        loader.load(committed, tensors)
        for name, value in tensors["optimizer"].items() if loses_state else ():
            if name.startswith("state.") and isinstance(value, torch.Tensor):
                value.zero_()
        engine.restore(tensors)
        losses[plan, optimizer] = advance(engine, config, range(SAVED, SAVED + CONTINUED))
    return losses


def configs_of(parallel: dict[str, Any], micro_batch: int | None = None) -> dict[tuple[str, str], RunConfig]:
    return {
        (plan, optimizer): config_of(plan, optimizer, parallel=parallel, train={"micro_batch": micro_batch})
        for plan, optimizer in CELLS
    }


@pytest.fixture(scope="module")
def uninterrupted() -> dict[tuple[str, str], Any]:
    losses = {}
    for key, config in configs_of({}).items():
        engine = build_engine(config, here())
        engine.initialize()
        losses[key] = advance(engine, config, range(SAVED + CONTINUED))[SAVED:]
    return losses


@pytest.fixture(scope="module", params=SAVERS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, uninterrupted: dict[tuple[str, str], Any]
) -> Path:
    """A folder of checkpoints of every cell, one for each saver; the savers themselves went on undisturbed."""
    ranks, parallel = SAVERS[request.param]
    folder = tmp_path_factory.mktemp("saved")
    for losses in run_ranks(save, ranks, configs_of(parallel), folder, timeout=200):
        assert_same(losses, uninterrupted)
    return folder


def assert_same(found: dict[tuple[str, str], Any], expected: dict[tuple[str, str], Any]) -> None:
    assert set(found) == set(expected)
    for key, steps in expected.items():
        assert torch.tensor(found[key]).tolist() == [pytest.approx(step, rel=TOLERANCE) for step in steps], key


def proceed_all(loaders: list[str], folder: Path) -> dict[str, dict[tuple[str, str], Any]]:
    """Several loaders in the same processes, which take long to start."""
    return {loader: proceed(configs_of(*LOADERS[loader][1:]), folder) for loader in loaders}


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_engine_goes_on(saved: Path, ranks: int, uninterrupted: dict[tuple[str, str], Any]) -> None:
    """Loss and gradient norm of the next five steps are the uninterrupted single process's. Norms see the first
    moments at once, and the losses of five steps the rest: a state that is lost, shifted or of another parameter
    shows."""
    loaders = [name for name, (size, _, _) in LOADERS.items() if size == ranks]
    for found in run_ranks(proceed_all, ranks, loaders, saved, timeout=250):
        assert list(found) == loaders
        for losses in found.values():
            assert_same(losses, uninterrupted)


def test_a_lost_state_would_show(saved: Path, uninterrupted: dict[tuple[str, str], Any]) -> None:
    """The comparison above is sharp enough to see what it is there to see."""
    losses = proceed(configs_of({}, 8), saved, loses_state=True)
    for key, steps in uninterrupted.items():
        assert torch.tensor(losses[key]).tolist() != [pytest.approx(step, rel=TOLERANCE) for step in steps], key
