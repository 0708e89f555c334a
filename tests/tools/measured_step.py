"""The memory that two real steps take on a CPU: ``python -m tests.tools.measured_step CONFIG_AS_JSON``, or torchrun.

Prints the peak of the process's resident memory over what it had before the model was built, in bytes.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pretrain.cli import build
from pretrain.config import RunConfig
from pretrain.counts import derive_counts
from pretrain.distributed import World, joined
from pretrain.engines import build_engine
from pretrain.step import train_step
from pretrain.telemetry.throughput import peak_resident_bytes

SHORT = 8  # tokens of the first step's sequences: it makes the optimizer's state


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def step_twice(config: RunConfig, world: World) -> None:
    counts = derive_counts(config, world.size)
    engine = build_engine(config, world)
    engine.initialize()
    mine = counts.micro_batch * counts.accumulation
    rows = torch.randint(config.model.vocabulary, (mine, counts.sequence_length + 1))
    for step, part in enumerate((rows[:, : SHORT + 1], rows)):
        train_step(engine, part, step, config, counts, world, eos=0)


def main(tree: str) -> None:
    torch.set_num_threads(1)
    config = build(json.loads(tree), "test")
    sizes = replace(config.model, width=32, depth=1, heads=2, ffn_width=64, vocab_size=64)
    with joined("cpu") as world:
        step_twice(replace(config, model=sizes), world)  # what libraries load and keep at their first use
        gc.collect()
        before = resident()
        step_twice(config, world)
        peak = peak_resident_bytes()
        if world.is_main:
            print(f"measured: {peak - before}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
