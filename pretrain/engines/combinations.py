"""Which settings exclude each other, and why. docs/combinations.md has the table of what was tested together."""

from __future__ import annotations

from collections.abc import Iterator

from models.errors import ConfigError
from pretrain.config import ParallelConfig, RunConfig
from pretrain.distributed import World


def refuse_impossible(config: RunConfig, world: World) -> None:
    """ConfigError with the first pair that cannot be, before anything is built."""
    for message in _impossible(config, world):
        raise ConfigError(message)


def _impossible(config: RunConfig, world: World) -> Iterator[str]:
    parallel, precision, train = config.parallel, config.precision, config.train
    deepspeed = parallel.engine == "deepspeed"
    if deepspeed and parallel.zero_stage == 3 and train.compile:
        yield (
            "train.compile with parallel.zero_stage 3: DeepSpeed gathers parameters by hooks inside the blocks, which "
            "a compiled block would not see: write --parallel.zero_stage 2, or --parallel.engine fsdp"
        )
    if deepspeed and parallel.zero_stage == 0 and parallel.cpu_offload:
        yield "parallel.cpu_offload with parallel.zero_stage 0: DeepSpeed offloads from stage 1 on; write 1, 2 or 3"
    if not deepspeed and parallel.cpu_offload and world.size == 1 and world.device.type == "cuda":
        yield (
            "parallel.cpu_offload with one process: fsdp shards, and offloads, from two ranks on; write "
            "--parallel.engine deepspeed, or --parallel.cpu_offload false"
        )
    if parallel.shard_size is not None and parallel.shard != "hybrid":
        yield (
            f"parallel.shard_size {parallel.shard_size} with parallel.shard {parallel.shard}: write --parallel.shard "
            "hybrid, or --parallel.shard_size null"
        )
    if precision.fp8 != "none" and precision.compute != "bf16" and world.device.type == "cuda":
        yield (
            f"precision.fp8 {precision.fp8} with precision.compute fp32: a GPU's 8-bit products give bf16; write "
            "--precision.compute bf16"
        )


def unheeded(config: RunConfig) -> list[str]:
    """A line for each setting that means nothing beside the others, so that none is ignored in silence."""
    default, parallel, precision = ParallelConfig(), config.parallel, config.precision
    keys = ("zero_stage",) if parallel.engine == "fsdp" else ("shard", "shard_size", "prefetch")
    other = "deepspeed" if parallel.engine == "fsdp" else "fsdp"
    lines = [
        f"parallel.{key} {getattr(parallel, key)} is of engine {other} and does nothing here"
        for key in keys
        if getattr(parallel, key) != getattr(default, key)
    ]
    if precision.fp8 == "none" and (precision.fp8_skip or precision.fp8_skip_first or precision.fp8_skip_last):
        lines.append("precision.fp8_skip, fp8_skip_first and fp8_skip_last do nothing where precision.fp8 is none")
    return lines
