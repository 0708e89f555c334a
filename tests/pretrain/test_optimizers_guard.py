"""Steps that are left out: which, and that nothing happens in them, under every optimizer and on several ranks."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.errors import ConfigError
from pretrain.__main__ import main
from pretrain.config import MuonConfig, OptimizerConfig
from pretrain.engines import build_engine
from pretrain.engines.fsdp import FSDPEngine
from pretrain.optimizers import NormGuard, build_optimizer, slices
from pretrain.step import train_step
from pretrain.trainer import Trainer
from tests.pretrain.engine_runs import advance, config_of, here
from tests.ranks import run_ranks
from tests.runs import checkpoint_tensors, committed_steps, curve, metrics, write_config

NAN, INF = float("nan"), float("inf")


def judged(guard: NormGuard, norms: list[float]) -> list[int]:
    return [int(guard.judge(torch.tensor(norm))) for norm in norms]


def test_what_is_left_out_by_hand() -> None:
    guard = NormGuard(2.0, 4, torch.device("cpu"))
    # Until there are four: whatever is finite passes, and what is not does not enter.
    assert judged(guard, [1.0, NAN, 3.0, 100.0, INF, 2.0]) == [0, 1, 0, 0, 1, 0]
    assert guard.state() == {"norms": [1.0, 3.0, 100.0, 2.0], "left_out": 2, "in_a_row": 0}
    guard.load_state({"norms": [1.0, 3.0, 1.0, 3.0], "left_out": 2, "in_a_row": 0})
    limit = 2.0 + 2.0 * (4 / 3) ** 0.5  # the mean and two sample deviations: 4.31
    assert judged(guard, [limit - 0.001]) == [0]
    guard.load_state({"norms": [1.0, 3.0, 1.0, 3.0], "left_out": 2, "in_a_row": 0})
    assert judged(guard, [1e9]) == [1]
    assert guard.state()["norms"] == pytest.approx([3.0, 1.0, 3.0, limit])  # what would just have passed
    assert judged(guard, [INF, NAN, -INF]) == [1, 1, 1]
    assert guard.is_stuck
    assert guard.state()["norms"] == pytest.approx([3.0, 1.0, 3.0, limit])
    assert judged(guard, [0.0]) == [0]  # small ones are no reason
    assert (guard.state()["left_out"], guard.state()["in_a_row"], guard.is_stuck) == (6, 0, False)


def test_norms_that_have_risen_for_good_pass_after_a_while() -> None:
    """Long before the guard would call it stuck, though they are 270 of the old deviations above the old mean."""
    guard = NormGuard(6.0, 128, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    judged(guard, (1.0 + 0.1 * torch.rand(128, generator=generator)).tolist())
    risen = judged(guard, (9.0 + torch.rand(200, generator=generator)).tolist())
    assert risen[0] == 1
    assert sum(risen) < 64
    assert sum(risen[-100:]) == 0


def test_a_restored_guard_decides_as_it_would_have() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = (torch.randn(60, generator=generator).exp() * 3).tolist()
    norms[20] = NAN
    straight, first = (NormGuard(1.5, 8, torch.device("cpu")) for _ in range(2))
    expected = judged(straight, norms)
    for cut in (3, 25):
        first = NormGuard(1.5, 8, torch.device("cpu"))
        before = judged(first, norms[:cut])
        second = NormGuard(1.5, 8, torch.device("cpu"))
        second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
        assert before + judged(second, norms[cut:]) == expected
        assert second.state() == straight.state()  # every bit of it
    assert 0 < sum(expected) < 30


class RefuseReadback(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        aten = torch.ops.aten
        assert function not in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default)
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------------- nothing happens in them

OPTIMIZERS = {
    **{name: OptimizerConfig(name=name, lr=0.01, weight_decay=0.1) for name in ("msgdw", "adamw", "lion", "sgd-sai")},
    "muon": OptimizerConfig(name="muon", lr=0.01, weight_decay=0.1),
    "muon, msgdw": OptimizerConfig(name="muon", lr=0.01, muon=MuonConfig(others="msgdw"), nesterov=True),
}
CONFIGS = OPTIMIZERS | {
    f"{key}, bf16": replace(config, state_dtype="bf16", state_rounding="nearest") for key, config in OPTIMIZERS.items()
}
SHAPES = {"up": (6, 4), "down": (4, 6), "gain": (30,), "alpha": (1,), "none": (0,)}
ROLES = {"up": "matrix", "down": "matrix", "gain": "gain", "alpha": "alpha", "none": "gain"}


def trained(config: OptimizerConfig, steps: list[tuple[int, float]]) -> list[Any]:
    """Every bit of parameters and state after steps of (gradients' seed, found_inf); those left out have NaNs."""
    generator = torch.Generator().manual_seed(0)
    held = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    optimizer = build_optimizer(held, ROLES, config)
    for seed, found_inf in steps:
        generator = torch.Generator().manual_seed(seed)
        for parameter in held.values():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient if not found_inf else gradient * NAN
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        with RefuseReadback():
            optimizer.step()
    states = [optimizer.state[p] for p in held.values()]
    return [*(p.tolist() for p in held.values()), *([value.tolist() for value in state.values()] for state in states)]


@pytest.mark.parametrize("chunk", [8, 2**18])
@pytest.mark.parametrize("key", CONFIGS)
def test_a_step_left_out_changes_no_bit(key: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "CHUNK_ELEMENTS_CPU", chunk)
    config = CONFIGS[key]
    without = trained(config, [(1, 0.0), (2, 0.0), (3, 0.0)])
    assert trained(config, [(1, 0.0), (7, 1.0), (2, 0.0), (8, 1.0), (9, 1.0), (3, 0.0)]) == without
    assert trained(config, [(1, 0.0), (7, 0.0), (2, 0.0), (3, 0.0)]) != without


def test_a_run_may_begin_with_one() -> None:
    """But for dampening, which knows a first step by the state it makes, and g-SNR, which is then what it would be for
    gradients of mean 0."""
    for key in ("msgdw", "adamw", "lion", "muon"):
        assert trained(CONFIGS[key], [(7, 1.0), (1, 0.0)]) == trained(CONFIGS[key], [(1, 0.0)]), key
    first = trained(CONFIGS["sgd-sai"], [(7, 1.0), (1, 0.0)])
    assert all(value == value for part in first for value in _numbers(part))  # no NaN


def _numbers(values: Any) -> list[float]:
    return [number for value in values for number in _numbers(value)] if isinstance(values, list) else [values]


def left_out(names: list[str], parallel: dict[str, Any]) -> dict[str, bool]:
    """For each optimizer: whether a step with an infinite gradient on the last rank alone changed nothing, and the next
    one something."""
    found = {}
    for name in names:
        config = config_of("dyt", "msgdw", train={"skip_norm_sigma": 6.0, "skip_window": 2}, parallel=parallel)
        config = replace(config, optimizer=OptimizerConfig(name=name, lr=0.01, weight_decay=0.1))  # type: ignore[arg-type]
        engine = build_engine(config, here())
        engine.initialize()
        advance(engine, config, range(1))
        before = bits(engine)
        objective = engine._objective  # type: ignore[attr-defined]

        def ruined(batch: Any, targets: Tensor, objective: Any = objective) -> tuple[Tensor, Tensor]:
            value, nll = objective(batch, targets)
            return value * (INF if here().rank == here().size - 1 else 1.0), nll

        engine._objective = ruined  # type: ignore[attr-defined]
        norms = [advance(engine, config, range(1, 2))[0][1]]
        engine._objective = objective  # type: ignore[attr-defined]
        unchanged = bits(engine) == before
        norms.append(advance(engine, config, range(2, 3))[0][1])
        assert engine.guard is not None
        counted = engine.guard.state()["left_out"] == 1
        found[name] = unchanged and counted and not norms[0] < INF and norms[1] < INF and bits(engine) != before
    return found


def bits(engine: Any) -> list[Any]:
    tensors = engine.tensors()
    values = [*tensors["model"].values(), *(v for v in tensors["optimizer"].values() if isinstance(v, Tensor))]
    return [(v.to_local() if isinstance(v, DTensor) else v).tolist() for v in values]


NAMES = ["msgdw", "adamw", "lion", "muon", "sgd-sai"]


def test_an_engine_leaves_a_step_out() -> None:
    assert left_out(NAMES, {}) == dict.fromkeys(NAMES, True)


def test_a_stop_waits_for_a_step_that_is_worth_a_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request to save, told once, is kept while losses are not finite."""
    steps = itertools.count(1)
    run = tmp_path / "runs/small"

    def step(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, norm = train_step(*arguments)
        count = next(steps)
        if count == 3:
            (run / "save").touch()
        return (loss * NAN, norm) if count in (3, 4, 5) else (loss, norm)

    monkeypatch.setattr("pretrain.control._LOOK", 0.0)  # else the file is looked for once a second
    monkeypatch.setattr("pretrain.trainer.train_step", step)
    guarded = {"train": {"skip_norm_sigma": 6.0}, "log": {"every": 100}}
    assert main([str(write_config(tmp_path, corpus, guarded))]) == 0
    said = capsys.readouterr().err
    assert [f"no checkpoint at step {n}" in said for n in (2, 3, 4, 5, 6)] == [False, True, True, True, False]
    assert committed_steps(run) == [6, 20]
    assert not (run / "save").exists()


@pytest.mark.parametrize("parallel", [{}, {"engine": "deepspeed", "zero_stage": 0}], ids=["full", "ZeRO-0"])
def test_all_ranks_leave_it_out(parallel: dict[str, Any]) -> None:
    for found in run_ranks(left_out, 2, NAMES, parallel, timeout=120):
        assert found == dict.fromkeys(NAMES, True)


def test_where_it_cannot_be_it_is_refused() -> None:
    guarded = {"skip_norm_sigma": 6.0}
    for parallel, says in (
        ({"engine": "deepspeed", "zero_stage": 2}, "--parallel.zero_stage 0"),
        ({"cpu_offload": True}, "--parallel.cpu_offload false"),
    ):
        with pytest.raises(ConfigError, match=says):
            build_engine(config_of(train=guarded, parallel=parallel), here())
    for train, says in (({"skip_norm_sigma": 0.0}, "skip_norm_sigma"), ({"skip_window": 1}, "skip_window")):
        with pytest.raises(ConfigError, match=rf"train\.{says} is"):
            config_of(train=train)


# ---------------------------------------------------------------------- whole runs


def spoil(monkeypatch: pytest.MonkeyPatch, bad: Any) -> None:
    """Make the gradient of the update calls whose number, from 1, ``bad`` has, not finite."""
    original, steps = FSDPEngine.step, itertools.count(1)

    def step(engine: FSDPEngine, lr: float) -> Tensor:
        if next(steps) in bad:
            next(engine.model.parameters()).grad[0, 0] = NAN  # type: ignore[index]
        return original(engine, lr)

    monkeypatch.setattr(FSDPEngine, "step", step)


def test_a_run_goes_on_and_a_resumed_one_decides_alike(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded = {"train": {"skip_norm_sigma": 1.0, "skip_window": 6}, "checkpoint": {"every": 10}}
    config = write_config(tmp_path, corpus, guarded)
    spoil(monkeypatch, {7, 10})
    assert main([str(config)]) == 0
    said = capsys.readouterr().err
    whole, part = tmp_path / "runs/small", tmp_path / "part/small"
    lines = metrics(whole)
    assert [line["steps_left_out"] for line in lines][5:7] == [0, 1]
    assert lines[9]["grad_norm"] is None
    assert "to step 7: 1 left out, 1 in all" in said
    assert lines[-1]["steps_left_out"] > 2  # one deviation is not much: some finite ones too
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints/step-00000020")
    assert main([str(config), "--runs_dir", str(part.parent)]) == 0
    assert curve(part) == curve(whole)
    assert [line["steps_left_out"] for line in metrics(part)] == [line["steps_left_out"] for line in lines]
    there, here_ = (checkpoint_tensors(run / "checkpoints/step-00000020") for run in (whole, part))
    assert all(torch.equal(here_[key], value) for key, value in there.items() if isinstance(value, Tensor))


def test_a_run_that_leaves_out_a_window_of_steps_ends(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded = {"train": {"skip_norm_sigma": 6.0, "skip_window": 4}, "checkpoint": {"every": 5}}
    config = write_config(tmp_path, corpus, guarded)
    spoil(monkeypatch, range(8, 100))
    assert main([str(config)]) == 3
    assert "the last 4 steps were left out" in capsys.readouterr().err
    assert committed_steps(tmp_path / "runs/small") == [5, 10]  # of step 7's weights, which are whole


def test_weights_that_give_no_finite_loss_are_never_committed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finite gradient and a learning rate that is far too large: the weights are finite, and no loss is."""
    original, steps = FSDPEngine.step, itertools.count(1)
    monkeypatch.setattr(FSDPEngine, "step", lambda engine, lr: original(engine, 3e38 if next(steps) == 7 else lr))
    guarded = {"train": {"skip_norm_sigma": 6.0, "skip_window": 50}, "checkpoint": {"every": 5}}
    monkeypatch.setattr(Trainer, "_validate", lambda trainer, rows: {})  # would say so too
    assert main([str(write_config(tmp_path, corpus, guarded))]) == 3
    said = capsys.readouterr().err
    assert "no checkpoint at step 10, where the loss is nan" in said
    assert "at step 20, the last, the loss is nan" in said
    assert committed_steps(tmp_path / "runs/small") == [5]
