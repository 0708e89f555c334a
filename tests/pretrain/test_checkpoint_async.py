"""Saves beside the training: the same bits, no less safe, and no hurry lost when they fail.

The writing thread is stopped at a chosen operation on the disk until the training is steps ahead, so that what a test
says happens during the write does.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.errors import ConfigError
from pretrain.__main__ import main
from pretrain.checkpoint import Checkpointer
from pretrain.checkpoint.staging import stage
from pretrain.checkpoint.tensors import read_metadata
from pretrain.cli import load
from pretrain.distributed import World
from pretrain.engines.fsdp import FSDPEngine
from pretrain.trainer import Outcome, Trainer
from tests.disk import watch
from tests.ranks import RankError, run_ranks
from tests.runs import ONE_THREAD, REPOSITORY, checkpoint_tensors, committed_steps, curve, write_config

EVERY = 7
SHORT = {
    "train": {"steps": 21},
    "checkpoint": {"every": EVERY, "keep": 3, "asynchronous": True},
    "model": {"dropout": 0.1},  # so that the generators move on during the write
}


def trainer_here(config: Path, *arguments: str) -> Trainer:
    """On the ranks of `run_ranks`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    control = dist.new_group(backend="gloo") if size > 1 else None
    return Trainer(load(config, arguments), World(rank, size, torch.device("cpu"), control))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def train(config: Path, runs: Path, *arguments: str) -> int:
    """The step that the run went on from."""
    trainer = trainer_here(config, "--runs_dir", str(runs), *arguments)
    start = trainer.step
    assert trainer.run() is Outcome.FINISHED
    return start


def train_ahead(config: Path, runs: Path) -> list[tuple[int, int]]:
    """Each checkpoint's step, and how many were done when this rank began to write its tensors."""
    trainer = trainer_here(config, "--runs_dir", str(runs))
    seen: dict[int, int] = {}

    def see(operation: str, path: str) -> None:
        if operation == "open" and path.endswith(f".partial/__{dist.get_rank()}_0.distcp"):
            step = int(path.split(".step-")[1].split(".")[0])
            until(lambda: trainer.step >= min(step + 2, trainer.counts.steps))
            seen.setdefault(step, trainer.step)

    watch(runs, see)
    assert trainer.run() is Outcome.FINISHED
    return list(seen.items())


def contents(checkpoint: Path) -> dict[str, Any]:
    """What two runs have in common: the map of shards holds a random id, and the ranks' files generators of Python and
    NumPy that nobody seeds."""
    found: dict[str, Any] = {
        path.name: path.read_bytes() for path in [*checkpoint.glob("*.distcp"), checkpoint / "extras.json"]
    }
    for path in checkpoint.glob("rank-*.pt"):
        found[path.name] = torch.load(path, weights_only=True)["cpu"].tolist()
    return found | {"tensors": read_metadata(checkpoint).state_dict_metadata}


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_bits_are_those_of_a_synchronous_save(corpus: Path, tmp_path: Path, world_size: int) -> None:
    config = write_config(tmp_path, corpus, SHORT)
    run_ranks(train, world_size, config, tmp_path / "sync", "--checkpoint.asynchronous", "false")
    for seen in run_ranks(train_ahead, world_size, config, tmp_path / "async"):
        assert [step for step, _ in seen] == [7, 14, 21]
        assert all(now >= step + 2 for step, now in seen[:-1]), "training stood still during the write"
    for step in (7, 14, 21):
        one, other = (tmp_path / mode / f"small/checkpoints/step-{step:08d}" for mode in ("sync", "async"))
        assert contents(one).keys() >= {f"__{world_size - 1}_0.distcp", f"rank-{world_size - 1:05d}.pt"}
        assert contents(one) == contents(other)
    assert curve(tmp_path / "sync/small") == curve(tmp_path / "async/small")


def test_a_disk_slower_than_the_saves(corpus: Path, tmp_path: Path) -> None:
    """Each save waits for the one before; none is left out."""
    config = write_config(tmp_path, corpus, SHORT, {"train": {"steps": 6}, "checkpoint": {"every": 1, "keep": 9}})
    run_ranks(train_slowly, 1, config)
    assert committed_steps(tmp_path / "runs/small") == [1, 2, 3, 4, 5, 6]


def train_slowly(config: Path) -> None:
    trainer = trainer_here(config)
    watch(trainer.folder.checkpoints, lambda operation, path: time.sleep(0.02 * (operation == "fsync")))
    assert trainer.run() is Outcome.FINISHED


# ---------------------------------------------------------------------- a write that fails


def train_into_a_failure(config: Path, faulty_rank: int) -> tuple[str, bool, int]:
    """The error, whether it is known to be every rank's, and the steps that were done."""
    trainer = trainer_here(config)

    def see(operation: str, path: str) -> None:
        if dist.get_rank() == faulty_rank and operation == "fsync" and f"00100.partial/rank-{faulty_rank:05d}" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    watch(trainer.folder.checkpoints, see)
    with pytest.raises(ConfigError) as error:
        trainer.run()
    return str(error.value), error.value.agreed, trainer.step


@pytest.mark.parametrize(("world_size", "faulty_rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_failed_write_stops_all_ranks_soon(corpus: Path, tmp_path: Path, world_size: int, faulty_rank: int) -> None:
    config = write_config(tmp_path, corpus, SHORT, {"train": {"steps": 400}, "checkpoint": {"every": 100}})
    outcomes = run_ranks(train_into_a_failure, world_size, config, faulty_rank)
    assert outcomes == outcomes[:1] * world_size, "the same error at the same step"
    message, agreed, step = outcomes[0]
    assert message.startswith(f"no space for the checkpoint of step 100 in {tmp_path / 'runs/small/checkpoints'}: ")
    assert "\n" not in message
    assert agreed, "every rank would say it"
    assert 100 < step < 200, "only the next save noticed"
    assert not list((tmp_path / "runs/small/checkpoints").iterdir())


def test_the_last_write_that_fails_is_an_error(corpus: Path, tmp_path: Path) -> None:
    """There is no step after it to notice."""
    config = write_config(tmp_path, corpus, SHORT, {"train": {"steps": 100}, "checkpoint": {"every": 0}})
    outcomes = run_ranks(train_into_a_failure, 2, config, 1)
    assert all(message.startswith("no space") and step == 100 for message, _, step in outcomes)


# ---------------------------------------------------------------------- a loop that ends during the write


@pytest.fixture
def slow_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpointer.save

    def slow(*args: Any, **kwargs: Any) -> Path:
        time.sleep(0.5)
        return save(*args, **kwargs)

    monkeypatch.setattr(Checkpointer, "save", slow)


@pytest.mark.usefixtures("slow_saves")
@pytest.mark.parametrize("value", [float("nan"), None], ids=["diverged", "crashed"])
def test_a_run_that_ends_badly_still_commits_what_it_saved(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float | None
) -> None:
    original = FSDPEngine.step
    steps = 0

    def step(engine: FSDPEngine, lr: float) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == EVERY + 1:
            assert committed_steps(tmp_path / "runs/small") == [], "the write is over already"
            if value is None:
                raise RuntimeError("out of memory, say")
            next(engine.model.parameters()).grad[0, 0] = value  # type: ignore[index]
        return original(engine, lr)

    monkeypatch.setattr(FSDPEngine, "step", step)
    config = write_config(tmp_path, corpus, SHORT)
    if value is None:
        with pytest.raises(RuntimeError, match="out of memory, say"):
            main([str(config)])
    else:
        assert main([str(config)]) == 3
    assert committed_steps(tmp_path / "runs/small") == [EVERY]


@pytest.mark.usefixtures("slow_saves")
def test_what_is_said_of_a_save(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, corpus, SHORT, {"checkpoint": {"every": 0}})
    assert main([str(config)]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("checkpoint of step 21 ")]
    words = line.split()
    assert line.startswith("checkpoint of step 21 committed in ")
    assert float(words[words.index("in") + 1]) >= 0.5
    assert float(words[-2]) < 0.5, "how long the step was held up"


def interrupt(config: str, folder: str, number: str, times: str) -> int:
    """`main`, with a signal as the first write of a checkpoint begins, which then takes a while."""
    begun: list[str] = []

    def see(operation: str, path: str) -> None:
        if operation == "open" and path.endswith(".distcp") and not begun:
            begun.append(path)
            for _ in range(int(times)):
                os.kill(os.getpid(), int(number))
                time.sleep(0.3)
            time.sleep(0 if times == "1" else 60)

    watch(Path(folder), see)
    return main([config])


def interrupted(config: Path, run: Path, number: signal.Signals, times: int) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since how the interpreter ends is of interest too."""
    call = "import sys; from tests.pretrain.test_checkpoint_async import interrupt; sys.exit(interrupt(*sys.argv[1:]))"
    arguments = [str(config), str(run), str(int(number)), str(times)]
    return subprocess.run(
        [sys.executable, "-c", call, *arguments],
        cwd=REPOSITORY,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_a_polite_signal_during_the_write_commits_and_exits_75(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, SHORT, {"train": {"steps": 500}, "checkpoint": {"every": 100}})
    run = tmp_path / "runs/small"
    done = interrupted(config, run, signal.SIGTERM, 1)
    assert done.returncode == 75, done.stderr
    first, last = committed_steps(run)
    assert first == 100, "the write that the signal fell into"
    assert 100 < last < 200
    assert done.stdout.startswith(f"stopped: step {last} of 500")
    assert run_ranks(train, 1, config, tmp_path / "runs") == [last]
    run_ranks(train, 1, config, tmp_path / "quiet")
    assert curve(run) == curve(tmp_path / "quiet/small")


def test_an_impatient_interrupt_does_not_wait_long(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, SHORT, {"train": {"steps": 500}, "checkpoint": {"every": 100}})
    checkpoints = tmp_path / "runs/small/checkpoints"
    done = interrupted(config, tmp_path / "runs/small", signal.SIGINT, 2)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith("interrupted: ")
    assert [path.name for path in checkpoints.iterdir()] == [".step-00000100.partial"]
    assert run_ranks(train, 1, config, tmp_path / "runs", "--data.verify", "false") == [0]
    assert committed_steps(tmp_path / "runs/small") == [300, 400, 500]
    assert not list(checkpoints.glob(".*")), "the start sweeps"


# ---------------------------------------------------------------------- killed during the write

PARTIAL, OLD = ".step-00000014.partial", "step-00000007"
PHASES = [
    ("os.mkdir", PARTIAL, 7),
    ("open", f"{PARTIAL}/__0_0.distcp", 7),
    ("fsync", f"{PARTIAL}/__0_0.distcp", 7),
    ("synced", f"{PARTIAL}/__0_0.distcp", 7),
    ("fsync", f"{PARTIAL}/.metadata.tmp", 7),
    ("open", f"{PARTIAL}/rank-00000.pt", 7),
    ("synced", f"{PARTIAL}/rank-00000.pt", 7),
    ("fsync", f"{PARTIAL}/extras.json", 7),
    ("open", f"{PARTIAL}/manifest.json", 7),
    ("synced", f"{PARTIAL}/manifest.json", 7),
    ("os.rename", PARTIAL, 7),
    ("fsync", "checkpoints", 14),  # the rename is done
    ("os.rename", OLD, 14),
    ("shutil.rmtree", f".{OLD}.removed", 14),
]


def train_to_death(config: Path, runs: Path, struck: int, operation: str, name: str) -> None:
    """SIGKILL to rank ``struck`` when its thread comes to ``operation`` on the file, training two steps ahead."""
    trainer = trainer_here(config, "--runs_dir", str(runs), "--checkpoint.keep", "1")

    def see(happens: str, path: str) -> None:
        second = name != "checkpoints" or (trainer.folder.checkpoints / "step-00000014").exists()
        if dist.get_rank() == struck and happens == operation and path.endswith(f"/{name}") and second:
            until(lambda: trainer.step >= 16)
            os.kill(os.getpid(), signal.SIGKILL)

    watch(runs, see)
    trainer.run()


def same_checkpoints(one: Path, other: Path) -> None:
    here, there = checkpoint_tensors(one), checkpoint_tensors(other)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here if isinstance(here[name], torch.Tensor))


@pytest.mark.drill
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_kill_in_every_phase_of_the_write_leaves_no_trace(corpus: Path, tmp_path: Path, world_size: int) -> None:
    config = write_config(tmp_path, corpus, SHORT)
    quiet = tmp_path / "quiet/small"
    run_ranks(train, world_size, config, quiet.parent)
    others = [("open", f"{PARTIAL}/__1_0.distcp", 7), ("synced", f"{PARTIAL}/rank-00001.pt", 7)]
    phases = PHASES if world_size == 1 else [PHASES[0], PHASES[7], PHASES[10], PHASES[11], *others]
    for number, (operation, name, newest) in enumerate(phases):
        runs = tmp_path / str(number)
        struck = 1 if (operation, name, newest) in others else 0
        with pytest.raises(RankError) as error:
            run_ranks(train_to_death, world_size, config, runs, struck, operation, name)
        assert "died" in error.value.outcomes[struck], (operation, name)
        assert committed_steps(runs / "small")[-1] == newest, (operation, name)
        assert run_ranks(train, world_size, config, runs) == [newest] * world_size
        assert not list((runs / "small/checkpoints").glob(".*"))
        assert curve(runs / "small") == curve(quiet)
        same_checkpoints(runs / "small/checkpoints/step-00000021", quiet / "checkpoints/step-00000021")


# ---------------------------------------------------------------------- the copy


def test_a_copy_shares_nothing_and_is_made_in_the_memory_of_the_last() -> None:
    matrix = torch.randn(6, 4)
    state: dict[str, Any] = {
        "model": {"matrix": matrix, "view": matrix.t()[1:3], "scalar": torch.tensor(2.0), "none": matrix[:0]},
        "optimizer": {"groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], "w": {"half": matrix.bfloat16()}},
    }
    first = stage(state, {})
    expected = {name: value.clone() for name, value in state["model"].items()}
    matrix.zero_()
    state["optimizer"]["groups"][0]["lr"] = 0.0
    assert all(first["model"][name].equal(value) for name, value in expected.items())
    assert first["optimizer"]["groups"] == [{"lr": 0.1, "betas": (0.9, 0.95)}]
    assert first["optimizer"]["w"]["half"].dtype is torch.bfloat16

    place = first["model"]["matrix"].data_ptr()
    state["optimizer"]["w"] = {"half": matrix.float(), "new": torch.ones(1)}  # what a step may bring
    second = stage(state, first)
    assert second["model"]["matrix"].data_ptr() == place
    assert second["model"]["matrix"].equal(torch.zeros(6, 4))
    assert second["optimizer"]["w"]["half"].dtype is torch.float32
    assert second["optimizer"]["w"]["new"].equal(torch.ones(1))


def stage_shards() -> bool:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(21.0).reshape(7, 3)
    shard, small = distribute_tensor(whole, mesh, [Shard(0)]), distribute_tensor(whole[:1], mesh, [Shard(0)])
    first = stage({"w": shard, "alpha": small}, {})
    shard.zero_()
    place = first["w"].to_local().data_ptr()
    assert isinstance(first["alpha"], DTensor)
    assert first["alpha"].full_tensor().equal(whole[:1])
    assert (first["w"].placements, first["w"].device_mesh) == (shard.placements, mesh)
    assert first["w"].full_tensor().equal(whole)
    second = stage({"w": shard, "alpha": small}, first)
    assert second["w"].full_tensor().equal(torch.zeros(7, 3))
    return second["w"].to_local().data_ptr() == place


def test_a_copy_of_shards_is_sharded_alike() -> None:
    """Of a tensor with fewer rows than ranks too, where a shard is empty."""
    assert run_ranks(stage_shards, 3) == [True] * 3
