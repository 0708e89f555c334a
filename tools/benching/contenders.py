"""What `tools.bench model` compares: our training step in one configuration or another, and other people's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from models import ConfigError, ModelConfig
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.counts import derive_counts
from pretrain.data.manifest import read_manifest
from pretrain.distributed import World
from pretrain.engines import require_compiler
from pretrain.planning.sizes import measure
from pretrain.telemetry import flops_per_token
from tools.benching import huggingface, llamas, nanogpt
from tools.benching.loop import Loop, Windows
from tools.benching.ours import OurSteps

# compute precision and compilation, by the names that the command line and the table use
VARIANTS: dict[str, tuple[Literal["fp32", "bf16"], bool]] = {
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
    "fp32+compile": ("fp32", True),
    "bf16+compile": ("bf16", True),
}
PEERS = ("nanogpt", *llamas.LLAMAS)
Family = Literal["gpt", "llama", ""]  # whose model a peer has; "" of our own configurations
Role = Literal["reference", "twin", "own"]


class Steps(Protocol):
    """What takes turns: a model, its optimizer and its data."""

    waited: float  # seconds so far in which a step was held up by its batch

    def step(self) -> None:
        """One optimizer step; on a GPU it may still be under way."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Contender:
    """``role``: what others are held against ("reference"), a peer's model on our stack ("twin"), or what was asked
    about ("own")."""

    name: str
    variant: str
    parameters: int
    flops: int  # of a token, forward and backward (telemetry/flops.py)
    tokens: int  # of one step
    steps: Steps
    role: Role
    family: Family = ""


def ours(config: RunConfig, world: World, name: str, role: Role, family: Family = "") -> Contender:
    """``config`` as training runs it."""
    steps, model = OurSteps(config, world), config.model
    length = config.data.sequence_length
    flops = flops_per_token(measure(model, 1).matmul, model.depth, model.width, length)
    tokens = derive_counts(config, world.size).batch_tokens
    return Contender(name, variant_of(config), count(steps.engine.model), flops, tokens, steps, role, family)


def peer(config: RunConfig, world: World, name: str) -> Contender:
    """One of PEERS with the sizes, micro-batches, data, precision and compilation of ``config``."""
    require_prepared(config, name)
    compiled = config.train.compile
    if compiled:
        require_compiler(world.device)
    length, counts = config.data.sequence_length, derive_counts(config, world.size)
    sizes = config.model
    torch.manual_seed(config.seed)
    if name == "nanogpt":
        with world.device:
            model: nn.Module = nanogpt.NanoGPT(
                vocabulary=sizes.vocabulary, width=sizes.width, depth=sizes.depth, heads=sizes.heads, length=length
            )
        optimizer = nanogpt.optimizer(model, world.device)
        loss: llamas.Loss = torch.compile(model) if compiled else model
    else:
        model, loss = llamas.LLAMAS[name](llamas.llama_sizes(sizes, length), world.device, compiled)
        optimizer = huggingface.optimizer(model)
    bf16 = config.precision.compute == "bf16"
    windows = windows_of(config, counts.micro_batch, world.device)
    loop = Loop(model, loss, optimizer, windows, world.device, accumulation=counts.accumulation, bf16=bf16)
    matmul = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))  # a tied head is one of them
    flops = flops_per_token(matmul, sizes.depth, sizes.width, length)
    family: Family = "gpt" if name == "nanogpt" else "llama"
    return Contender(name, variant_of(config), count(model), flops, counts.batch_tokens, loop, "reference", family)


def require_prepared(config: RunConfig, name: str) -> None:
    """ConfigError where a peer could not read the data."""
    if config.data.source != "prepared":
        raise ConfigError(f"data.source is stream, which {name} cannot read: write --data.source prepared")


def windows_of(config: RunConfig, rows: int, device: torch.device) -> Windows:
    """Of the training data, as a peer reads it."""
    file, dtype = largest_shard(config)
    return Windows(file, dtype, config.data.sequence_length, rows, device)


def largest_shard(config: RunConfig) -> tuple[Path, str]:
    """Of the training data, and the type of its tokens: a peer's loader reads one file."""
    folder = Path(config.data.path)
    manifest = read_manifest(folder)
    return folder / max(manifest.split("train", folder).shards, key=lambda shard: shard.tokens).file, manifest.dtype


def like(config: RunConfig, family: Family) -> RunConfig:
    """A peer's model and optimizer at the sizes of ``config``, on our stack."""
    sizes, length = config.model, config.data.sequence_length
    if family == "gpt":
        model = ModelConfig(
            plan="gpt",
            trunk="gpt",
            width=sizes.width,
            depth=sizes.depth,
            heads=sizes.heads,
            vocab_size=sizes.vocabulary,
            context=length,
        )
    else:
        model = llamas.llama_sizes(sizes, length)
    return replace(
        config,
        model=model,
        data=replace(config.data, document_mask=False),
        train=replace(config.train, clip=1.0, z_loss=0.0),
        precision=replace(config.precision, fp8="none"),
        optimizer=OptimizerConfig(name="adamw", lr=3e-4, weight_decay=0.1, beta1=0.9, beta2=0.95),
    )


def _alike(one: RunConfig, other: RunConfig) -> bool:
    """Whether model and optimizer do the same work, wherever they start from."""
    sizes, start = one.model, other.model
    start = replace(start, init=sizes.init, alpha=sizes.alpha, context=sizes.context)
    return sizes == start and one.optimizer.name == other.optimizer.name


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
        train=replace(config.train, compile=compiled, cuda_graphs=compiled and config.train.cuda_graphs),
    )


def lineup(
    own: Sequence[tuple[str, RunConfig]],
    others: Sequence[tuple[str, RunConfig | None]],
    variants: Sequence[str],
    world: World,
) -> Iterator[Contender]:
    """All that take part, in each of ``variants``, or as the configurations say if there are none.

    ``others``, references all: a configuration, or None for the peer of that name, of the sizes of ``own``'s first.
    After the first peer of a family comes its twin, unless ``own`` has the same model and optimizer.
    """
    choices: Sequence[str | None] = variants or [None]
    for variant in choices:
        configs = [(name, config if variant is None else in_variant(config, variant)) for name, config in own]
        first, twins = configs[0][1], set[Family]()
        for name, other in others:
            if other is not None:
                yield ours(other if variant is None else in_variant(other, variant), world, name, "reference")
                continue
            reference = peer(first, world, name)
            yield reference
            if reference.family in twins:
                continue
            twins.add(reference.family)
            same = like(first, reference.family)
            if any(_alike(same, config) for _, config in configs):
                continue
            twin = ours(same, world, f"our {reference.family}", "twin", reference.family)
            yield twin
            assert twin.parameters == reference.parameters, (twin.parameters, reference.parameters)
        for name, config in configs:
            yield ours(config, world, name, "own")
