"""What a save costs the training: ``python -m tests.checkpoint_cost --ranks 2 --width 384 --depth 8 --saves 5``.

Saves in the step and beside it take turns in one run. Times are the slowest rank's, in seconds: median (least to most).
A step counts as beside a write only if every rank still writes at its end. One thread a rank.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from models.config import ModelConfig
from pretrain.agreement import Ranks
from pretrain.checkpoint import Checkpointer, Saver, rng_state
from pretrain.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from pretrain.counts import derive_counts
from pretrain.distributed import World
from pretrain.engines import build_engine
from pretrain.step import train_step
from tests.ranks import run_ranks

SEQUENCE, QUIET = 128, 6  # tokens; steps before each save that are timed for comparison


def measure(folder: Path, width: int, depth: int, batch: int, saves: int) -> dict[str, list[float]]:
    """On each rank: seconds by what took them, and under "ratio" the step beside a write to the step before it."""
    config = RunConfig(
        model=ModelConfig(plan="llama", width=width, depth=depth, heads=8, vocab_size=8192, context=SEQUENCE),
        data=DataConfig(sequence_length=SEQUENCE),
        train=TrainConfig(steps=100_000, batch_tokens=batch * SEQUENCE * dist.get_world_size()),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4),
    )
    several = dist.get_world_size() > 1
    control, group = (dist.new_group(backend="gloo") if several else None for _ in range(2))
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), control)
    ranks, counts, engine = Ranks(control), derive_counts(config, world.size), build_engine(config, world)
    engine.initialize()
    checkpointer = Checkpointer(folder, keep=1, keep_every=None, group=group)
    beside, within = (Saver(checkpointer, asynchronous, lambda line: None) for asynchronous in (True, False))
    rows = torch.randint(8192, (batch, SEQUENCE + 1), generator=torch.Generator().manual_seed(world.rank))
    times: dict[str, list[float]] = {
        "parameters": [float(sum(p.numel() for p in engine.model.parameters()))],
        "checkpoint_bytes": [],
    }
    done = 0

    def timed(work: Callable[[], object]) -> float:
        started = time.monotonic()
        work()
        return max(ranks.together(lambda: time.monotonic() - started))

    def step() -> None:
        nonlocal done
        train_step(engine, rows, done, config, counts, world, eos=0)
        done += 1

    def save(saver: Saver) -> None:
        saver.save(done, engine.tensors, {}, rng_state())

    for _ in range(QUIET):
        step()
    for number in range(-1, saves):  # the first makes the memory of the copies
        quiet = [timed(step) for _ in range(QUIET)]
        held = timed(lambda: save(beside))
        started = time.monotonic()
        during = []
        while True:
            seconds = timed(step)
            if not all(ranks.together(lambda: beside.busy)):
                break
            during.append(seconds)
        beside.wait()
        wrote = time.monotonic() - started
        step()
        stopped = timed(lambda: save(within))
        found = (
            {"step": quiet, "step beside a write": during, "ratio": [median(during) / median(quiet)]} if during else {}
        )
        found |= {"save in the step": [stopped], "save beside: write": [wrote]}
        found |= {"save beside: hold, first" if number < 0 else "save beside: hold": [held]}
        for name, values in found.items():
            times.setdefault(name, []).extend(values)
    times["checkpoint_bytes"].append(float(sum(f.stat().st_size for f in next(folder.glob("step-*")).iterdir())))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoint_cost", description=__doc__)
    for name, default in (("ranks", 1), ("width", 384), ("depth", 8), ("batch", 1), ("saves", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary files'")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        sizes = (given.width, given.depth, given.batch, given.saves)
        times = run_ranks(measure, given.ranks, Path(folder), *sizes, timeout=1800)[0]
    [bytes_written], [_] = times.pop("checkpoint_bytes"), times.pop("parameters")
    print(f"{given.ranks} ranks, a checkpoint of {bytes_written / 1e6:.0f} MB")
    for name, values in times.items():
        print(f"{name:26} {median(values):8.3f} ({min(values):.3f} to {max(values):.3f}), {len(values)} times")


if __name__ == "__main__":
    main()
