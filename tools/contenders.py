"""What tools/bench.py compares: our training step in one configuration or another, and nanoGPT's of the same sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Protocol

import torch
from torch import nn

from models import ConfigError, ModelConfig
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.counts import derive_counts
from pretrain.data import Loader, open_source
from pretrain.data.manifest import read_manifest
from pretrain.distributed import World
from pretrain.engines import build_engine, require_compiler
from pretrain.step import train_step
from pretrain.telemetry import MetricsWriter
from pretrain.telemetry.inspection import Inspection
from tools.nanogpt import NanoGPT, NanoGPTLoop

# compute precision and compilation, by the names that the command line and the table use
VARIANTS: dict[str, tuple[Literal["fp32", "bf16"], bool]] = {
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
    "fp32+compile": ("fp32", True),
    "bf16+compile": ("bf16", True),
}


class Steps(Protocol):
    """What takes turns: a model, its optimizer and its data."""

    def step(self) -> None:
        """One optimizer step; on a GPU it may still be under way."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Contender:
    name: str
    variant: str
    parameters: int
    tokens: int  # of one step
    steps: Steps
    base: int  # whose rate this one's ratio is to, by its place among all


class OurSteps:
    """What the trainer does in a step, without what it does around it: the same engine, loader and calls. Steps that
    log.inspect_every asks for are inspected, and what is found is written, in a folder that goes with ``close``."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config, self._world = config, world
        self._counts = derive_counts(config, world.size)
        torch.manual_seed(config.seed)
        self.engine = build_engine(config, world)
        self.engine.initialize()
        self._source = open_source(replace(config.data, verify=False), config.seed)
        self._loader = Loader(
            self._source,
            batch_size=self._counts.sequences,
            prefetch=config.data.prefetch,
            pin_memory=world.device.type == "cuda",
        )
        self._inspection = Inspection(config, self._counts, self.engine, world, self._source.eos)
        self.folder: TemporaryDirectory[str] | None = None
        if config.log.inspect_every:
            self.folder = TemporaryDirectory(prefix="equipoise-bench-")
            self._metrics = MetricsWriter(Path(self.folder.name), config.log.tensorboard, 0)
        self._step = 0

    def step(self) -> None:
        rows = next(self._loader).tokens
        step = min(self._step, self._counts.steps - 1)  # a benchmark may be longer than the run
        self._step += 1
        watch = self._inspection.of_step(self._step)
        train_step(self.engine, rows, step, self._config, self._counts, self._world, self._source.eos, watch)
        if watch is not None:
            self._metrics.write(self._step, self._inspection.read(watch, rows))

    def close(self) -> None:
        self._loader.close()
        if self.folder is not None:
            self._metrics.close()
            self.folder.cleanup()


def ours(config: RunConfig, world: World, name: str, base: int) -> Contender:
    """``config`` as training runs it."""
    steps = OurSteps(config, world)
    tokens = derive_counts(config, world.size).batch_tokens
    return Contender(name, variant_of(config), count(steps.engine.model), tokens, steps, base)


def nanogpt(config: RunConfig, world: World, base: int) -> Contender:
    """nanoGPT with the sizes, micro-batches, precision and compilation of ``config``."""
    if config.train.compile:
        require_compiler(world.device)
    model, length, counts = config.model, config.data.sequence_length, derive_counts(config, world.size)
    folder = Path(config.data.path)
    manifest = read_manifest(folder)
    shard = max(manifest.split("train", folder).shards, key=lambda shard: shard.tokens)
    reference = NanoGPT(
        vocabulary=model.vocabulary, width=model.width, depth=model.depth, heads=model.heads, length=length
    )
    steps = NanoGPTLoop(
        reference,
        folder / shard.file,
        manifest.dtype,
        world.device,
        length=length,
        micro_batch=counts.micro_batch,
        accumulation=counts.accumulation,
        bf16=config.precision.compute == "bf16",
        compiled=config.train.compile,
    )
    return Contender("nanogpt", variant_of(config), count(reference), counts.batch_tokens, steps, base)


def like_nanogpt(config: RunConfig) -> RunConfig:
    """nanoGPT's model and optimizer at the sizes of ``config``, on our stack."""
    sizes = config.model
    return replace(
        config,
        model=ModelConfig(
            plan="gpt",
            trunk="gpt",
            width=sizes.width,
            depth=sizes.depth,
            heads=sizes.heads,
            vocab_size=sizes.vocabulary,
            context=config.data.sequence_length,
        ),
        data=replace(config.data, document_mask=False),
        train=replace(config.train, clip=1.0, z_loss=0.0),
        optimizer=OptimizerConfig(name="adamw", lr=6e-4, weight_decay=0.1, beta1=0.9, beta2=0.95),
    )


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def variant_of(config: RunConfig) -> str:
    return next(name for name, v in VARIANTS.items() if v == (config.precision.compute, config.train.compile))


def in_variant(config: RunConfig, name: str) -> RunConfig:
    """``config`` in the precision, compiled or not, that ``name`` in VARIANTS stands for."""
    precision, compiled = VARIANTS[name]
    return replace(
        config,
        precision=replace(config.precision, compute=precision),
        train=replace(config.train, compile=compiled),
    )


def with_nanogpt(config: RunConfig, name: str, variants: Sequence[str], world: World) -> Iterator[Contender]:
    """In each variant nanoGPT, "stack" (its model built from ours) and ``config``'s own model and optimizer."""
    if config.data.source != "prepared":
        raise ConfigError("data.source is stream, which nanoGPT cannot read: write --data.source prepared")
    for i, variant in enumerate(variants):
        varied = in_variant(config, variant)
        reference = nanogpt(varied, world, 3 * i)
        yield reference
        same = ours(like_nanogpt(varied), world, "stack", 3 * i)
        yield same
        assert same.parameters == reference.parameters, (same.parameters, reference.parameters)
        yield ours(varied, world, name, 3 * i)


def of_two(
    config: RunConfig, name: str, other: RunConfig, other_name: str, variants: Sequence[str], world: World
) -> Iterator[Contender]:
    """``other``, then ``config``, as each says or, if some are given, in each of ``variants``."""
    pairs = [(in_variant(other, v), in_variant(config, v)) for v in variants] or [(other, config)]
    for i, (base, mine) in enumerate(pairs):
        yield ours(base, world, other_name, 2 * i)
        yield ours(mine, world, name, 2 * i)
