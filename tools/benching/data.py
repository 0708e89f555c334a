"""The loader alone, beside what the model needs of it and beside nanoGPT's random reads of a memory map."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from pretrain.config import RunConfig
from pretrain.counts import derive_counts
from pretrain.data import Loader, open_source
from pretrain.distributed import World
from tools.benching.contenders import largest_shard, windows_of
from tools.benching.machine import copy_bandwidth, read_speed
from tools.benching.ours import OurSteps
from tools.benching.report import Row, Table
from tools.benching.timing import Spread, alternate, repeated, timed, wait

_TOKEN = torch.int64.itemsize  # bytes that a token has in a batch
_WARMUP = 3  # training steps


class Found(NamedTuple):
    """By round: seconds of a global batch by the loader, of one by the memory map, of a training step, and those for
    which the step was held up."""

    loader: list[float]
    windows: list[float]
    step: list[float]
    waited: list[float]


def measure(config: RunConfig, world: World, rounds: int, batches: int, steps: int) -> Found:
    """Turns of ``batches`` batches of each loader and of ``steps`` training steps. Without a prepared folder there is
    no memory map to read."""
    counts, cpu = derive_counts(config, 1), torch.device("cpu")
    source = open_source(replace(config.data, verify=False), config.seed)
    names = ["loader", "training step"]
    if config.data.source == "prepared":
        names.append("memory map")
        windows = windows_of(config, counts.sequences, cpu)
    training = OurSteps(config, world)
    pinned = world.device.type == "cuda"
    loader = Loader(source, batch_size=counts.sequences, prefetch=config.data.prefetch, pin_memory=pinned)

    def turn(place: int, warming: bool) -> tuple[float, float]:
        if names[place] == "loader":
            for _ in range(config.data.prefetch + 1):  # made while others had their turns
                next(loader)
            return timed(repeated(lambda: next(loader), batches)) / batches, 0.0
        if names[place] == "memory map":
            return timed(repeated(windows.fetch, batches)) / batches, 0.0
        for _ in range(_WARMUP if warming else 1):
            training.step()
        wait(world.device)
        waited, began = training.waited, time.perf_counter()
        for _ in range(steps):
            training.step()
        wait(world.device)
        return (time.perf_counter() - began) / steps, (training.waited - waited) / steps

    try:
        turns = dict(zip(names, alternate(names, turn, rounds), strict=True))
    finally:
        loader.close()
        training.close()
    return Found(
        [seconds for seconds, _ in turns["loader"]],
        [seconds for seconds, _ in turns.get("memory map", [])],
        [seconds for seconds, _ in turns["training step"]],
        [seconds for _, seconds in turns["training step"]],
    )


def tables(config: RunConfig, found: Found) -> tuple[list[Table], list[str]]:
    """Tokens per second of each, what a step waits, and what memory and disk allow.

    A token is read in the type of the file and written as int64: the limit is the rate at which the CPU's memory takes
    so many bytes.
    """
    tokens = derive_counts(config, 1).batch_tokens
    notes, stored = [], _TOKEN
    if config.data.source == "prepared":
        file, dtype = largest_shard(config)
        stored = np.dtype(dtype).itemsize
        disk = read_speed(file)
        notes.append(f"the disk reads {disk / 1e9:.2f} GB/s, {disk / stored:,.0f} tokens/s, where memory holds nothing")
    memory = copy_bandwidth(torch.device("cpu"))
    limit = memory / (stored + _TOKEN)
    need = Spread.of([tokens / seconds for seconds in found.step]).median

    def row(name: str, seconds: Sequence[float], why: str = "") -> Row:
        rate = [tokens / s for s in seconds]
        more = {"times the need": Spread.of(rate).median / need} if rate else {}
        return Row(name, rate, limit, more, why)

    rows = [
        row("loader", found.loader),
        row("random windows of a memory map", found.windows, "data.source is stream"),
        replace(row("training step: the need", found.step), limit=None),
    ]
    share = [waited / seconds for waited, seconds in zip(found.waited, found.step, strict=True)]
    waits = [Row("a step waits", [1e3 * waited for waited in found.waited])]
    shares = [Row("share of a step", [100 * one for one in share])]
    return [
        Table(f"Loading; copies in memory reach {memory / 1e9:.3g} GB/s", "tokens/s", rows),
        Table("Waiting for a batch", "ms", waits, is_cost=True),
        Table("Waiting for a batch, of a step", "%", shares, is_cost=True),
    ], notes
