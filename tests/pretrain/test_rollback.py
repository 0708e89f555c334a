"""Going back: when, to where, past which data; and that what follows is what training from there on that data gives."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.errors import ConfigError
from pretrain import rollback
from pretrain.__main__ import main
from pretrain.checkpoint import Checkpointer
from pretrain.cli import load
from pretrain.config import RollbackConfig
from pretrain.counts import derive_counts
from pretrain.data import open_source
from pretrain.engines import build_engine
from pretrain.rollback import Rollbacks
from pretrain.step import train_step
from pretrain.trainer import resolve_vocabulary
from tests.pretrain.engine_runs import here
from tests.ranks import run_ranks
from tests.runs import checkpoint_tensors, committed_steps, curve, metrics, write_config

NAN = float("nan")
LEVEL = [2.0, 2.1, 1.9, 2.05] * 8  # 32 losses: mean 2.0125, deviation 0.0751


def seen(rollbacks: Rollbacks, intervals: list[tuple[float, int]], first: int = 1) -> list[bool]:
    """``lasts`` after each (loss, steps left out so far)."""
    found = []
    for step, (loss, left_out) in enumerate(intervals, first):
        rollbacks.add(step, loss, left_out)
        found.append(rollbacks.lasts)
    return found


def test_what_a_lasting_spike_is() -> None:
    rollbacks = Rollbacks(RollbackConfig(times=1, sigma=6.0, after=2))
    # Without 32 to compare with, only what is not finite counts.
    wild = [(2.0, 0), (100.0, 0), (100.0, 0), (NAN, 0), (NAN, 0), (2.0, 0)]
    assert seen(rollbacks, wild) == [False] * 4 + [True, False]
    rollbacks = Rollbacks(RollbackConfig(times=1, sigma=6.0, after=2))
    seen(rollbacks, [(loss, 0) for loss in LEVEL])
    limit = 2.0125 + 6 * 0.0751
    assert seen(rollbacks, [(limit - 0.01, 0), (limit - 0.3, 0)], 33) == [False, False]
    seen(rollbacks, [(loss, 0) for loss in LEVEL], 35)
    assert seen(rollbacks, [(limit + 0.01, 0), (2.0, 0), (3.0, 0), (2.5, 0), (9.0, 0)], 67) == [False] * 3 + [True] * 2
    assert rollbacks.good_step == 68
    assert seen(rollbacks, [(2.0, 0), (2.0, 1), (2.0, 1), (2.0, 3), (2.0, 4)], 72) == [False] * 4 + [True]
    assert rollbacks.good_step == 74


def test_off_it_is_silent() -> None:
    rollbacks = Rollbacks(RollbackConfig())
    assert seen(rollbacks, [(NAN, i) for i in range(9)]) == [False] * 9
    assert (rollbacks.spikes, rollbacks.is_allowed, rollbacks.are_on) == (False, False, False)


def test_the_count_outlives_the_way_back_and_a_restart() -> None:
    config = RollbackConfig(times=2, after=1)
    rollbacks = Rollbacks(config)
    seen(rollbacks, [(2.0, 0)] * 3)
    saved = json.loads(json.dumps(rollbacks.state()))
    seen(rollbacks, [(NAN, 5)], 4)
    rollbacks.went_back(7, saved)
    assert (rollbacks.done, rollbacks.passed_over, rollbacks.good_step, rollbacks.lasts) == (1, 7, 3, False)
    resumed = Rollbacks(config)
    resumed.load_state(json.loads(json.dumps(rollbacks.state())))
    assert resumed.state() == rollbacks.state()
    resumed.went_back(3, None)
    assert (resumed.done, resumed.passed_over, resumed.good_step, resumed.is_allowed) == (2, 10, 0, False)


@pytest.mark.parametrize(
    ("rollback", "every", "says"),
    [
        ({"times": 1}, 0, r"write how often, in checkpoint\.every"),
        ({"times": -1}, 5, r"train\.rollback\.times is -1"),
        ({"times": 1, "after": 0}, 5, r"train\.rollback\.after is 0"),
        ({"times": 1, "sigma": 0.0}, 5, r"train\.rollback\.sigma is 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, rollback: dict[str, Any], every: int, says: str) -> None:
    path = write_config(tmp_path, tmp_path, {"train": {"rollback": rollback}, "checkpoint": {"every": every}})
    with pytest.raises(ConfigError, match=says):
        load(path)


# ---------------------------------------------------------------------- whole runs

BACK = {"train": {"rollback": {"times": 2, "after": 2}}, "checkpoint": {"every": 5, "keep": 9}}


def lose(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Add to the losses of the steps taken, counted from 1 whatever their number in the run."""
    taken = itertools.count(1)

    def step(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, norm = train_step(*arguments)
        return loss + losses.get(next(taken), 0.0), norm

    monkeypatch.setattr("pretrain.trainer.train_step", step)


def trained_from(config_path: Path, step: int, batches: range) -> dict[str, Tensor]:
    """The model after steps on these batches from the checkpoint of ``step``, without the trainer."""
    config = load(config_path)
    source = open_source(config.data, config.seed)
    config = resolve_vocabulary(config, source.vocabulary)
    counts = derive_counts(config, 1)
    engine = build_engine(config, here())
    checkpointer = Checkpointer(Path(config.runs_dir) / config.name / "checkpoints", 9, None)
    committed = checkpointer.latest(step)
    assert committed is not None
    assert committed.step == step
    tensors = engine.tensors()
    checkpointer.load(committed, tensors)
    engine.restore(tensors)
    for number, batch in enumerate(batches, step):
        rows = source.read(range(batch * counts.sequences, (batch + 1) * counts.sequences))
        train_step(engine, torch.from_numpy(rows), number, config, counts, here(), source.eos)
    return dict(engine.tensors()["model"])


def test_a_loss_that_is_not_finite_costs_its_data_and_no_more(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, corpus, {"name": "whole"}, {"checkpoint": {"every": 5, "keep": 9}})
    assert main([str(config)]) == 0
    hashes = [line["batch_hash"] for line in metrics(tmp_path / "runs/whole")]

    config = write_config(tmp_path, corpus, BACK)
    lose(monkeypatch, {12: NAN})
    capsys.readouterr()
    assert main([str(config)]) == 0
    said = capsys.readouterr().err
    assert "back to the checkpoint of step 10, past 2 batches of data, 1 of 2 times" in said
    run = tmp_path / "runs/small"
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["batch_hash"] for line in lines[:18]] == hashes[:10] + hashes[12:]
    assert [(line["rollbacks"], line["sequences_passed_over"]) for line in lines] == [(0, 0)] * 10 + [(1, 32)] * 10
    # Bit for bit what training from the checkpoint on the later data gives.
    expected = trained_from(config, 10, range(12, 22))
    found = checkpoint_tensors(run / "checkpoints/step-00000020")
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in expected.items())

    # A restart after that goes on with the data where the run was.
    part = tmp_path / "part/small"
    shutil.copytree(run, part)
    shutil.rmtree(part / "checkpoints/step-00000020")
    assert main([str(config), "--runs_dir", str(part.parent)]) == 0
    assert curve(part) == curve(run)
    assert metrics(part)[-1]["rollbacks"] == 1


def test_a_spike_that_lasts_and_one_that_does_not(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses 4 higher at step 7, and at 10 and 11. Step 10 is due a checkpoint and gets none: the spike is on."""
    monkeypatch.setattr(rollback, "_WINDOW", 4)
    lose(monkeypatch, {7: 4.0, 10: 4.0, 11: 4.0})
    assert main([str(write_config(tmp_path, corpus, BACK))]) == 0
    said = capsys.readouterr().err
    assert "a spike has lasted to step 11: back to the checkpoint of step 5, past 6 batches of data" in said
    assert said.count("back to the checkpoint") == 1
    assert [line["rollbacks"] for line in metrics(tmp_path / "runs/small")] == [0] * 5 + [1] * 15
    assert committed_steps(tmp_path / "runs/small") == [5, 10, 15, 20]


def test_checkpoints_of_the_spike_are_dropped(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made on request in it, where none was due."""
    monkeypatch.setattr(rollback, "_WINDOW", 4)
    monkeypatch.setattr("pretrain.control._LOOK", 0.0)
    seen_at: list[list[int]] = []
    run = tmp_path / "runs/small"
    taken = itertools.count(1)

    def step(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, norm = train_step(*arguments)
        count = next(taken)
        seen_at.append(committed_steps(run))
        if count == 7:
            (run / "save").touch()
        return loss + (4.0 if count in (7, 8) else 0.0), norm

    monkeypatch.setattr("pretrain.trainer.train_step", step)
    assert main([str(write_config(tmp_path, corpus, BACK))]) == 0
    assert seen_at[7] == [5, 7]
    assert seen_at[8] == [5]


def test_when_the_times_are_used_up_it_ends_as_before(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, corpus, BACK)
    lose(monkeypatch, dict.fromkeys(range(8, 100), NAN))
    assert main([str(config)]) == 3
    said = capsys.readouterr().err
    assert said.count("back to the checkpoint of step 5") == 2
    assert said.splitlines()[-1].startswith("at step 6 the loss is nan")
    assert committed_steps(tmp_path / "runs/small") == [5]


def test_without_a_checkpoint_before_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is not finite ends the run; one that is merely high does not."""
    monkeypatch.setattr(rollback, "_WINDOW", 3)
    config = write_config(tmp_path, corpus, BACK)
    with monkeypatch.context() as patch:
        lose(patch, {4: 9.0, 5: 9.0, 6: 9.0})
        assert main([str(config)]) == 0
    with monkeypatch.context() as patch:
        lose(patch, {4: NAN})
        assert main([str(config), "--name", "other"]) == 3
    assert "back to" not in capsys.readouterr().err


def on_ranks(config_path: str) -> dict[str, Any]:
    """Runs in which an infinite gradient on the last rank ruins step 7; what each has written."""
    import torch.distributed as dist

    from pretrain.distributed import World
    from pretrain.trainer import Trainer

    found = {}
    for name, arguments in {
        "fsdp": ["--optimizer.name", "muon", "--optimizer.lr", "0.01"],
        "deepspeed": ["--parallel.engine", "deepspeed", "--parallel.zero_stage", "2"],
    }.items():
        config = load(Path(config_path), ["--name", name, *arguments])
        world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.new_group(backend="gloo"))
        trainer = Trainer(config, world)
        taken = itertools.count(1)
        engine: Any = trainer.engine
        objective = engine._objective

        def ruined(
            batch: Any, targets: Tensor, taken: Any = taken, objective: Any = objective
        ) -> tuple[Tensor, Tensor]:
            value, nll = objective(batch, targets)
            return value * (float("inf") if next(taken) == 7 and dist.get_rank() else 1.0), nll

        engine._objective = ruined
        outcome = trainer.run()
        found[name] = (outcome.name, trainer.rollbacks.done, trainer.rollbacks.passed_over, trainer.step)
    return found


@pytest.mark.drill
def test_all_ranks_go_back(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, BACK, {"train": {"steps": 10}, "log": {"every": 2}})
    for found in run_ranks(on_ranks, 2, str(config), timeout=150):
        # Noticed when metrics are read, at step 8: back to 5, past the batches of steps 6 to 8.
        assert found == dict.fromkeys(("fsdp", "deepspeed"), ("FINISHED", 1, 3, 10))
    for name in ("fsdp", "deepspeed"):
        lines = metrics(tmp_path / "runs" / name)
        assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
        assert all(line["loss"] < 7 for line in lines)
