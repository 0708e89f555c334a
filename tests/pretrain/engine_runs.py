"""Short trainings on given ranks, engine and settings, by the engine and the step alone: what parity tests compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from models.config import InitConfig, ModelConfig
from pretrain.config import DataConfig, OptimizerConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from pretrain.counts import derive_counts
from pretrain.distributed import World
from pretrain.engines import build_engine
from pretrain.engines.protocol import Engine
from pretrain.step import train_step

LENGTH, VOCABULARY, SEQUENCES = 16, 96, 8

LEARNING_RATES = {"msgdw": 0.1, "adamw": 3e-3, "lion": 1e-3, "muon": 1e-2, "sgd-sai": 1e-4}


def config_of(plan: str = "dnt", optimizer: str = "msgdw", **sections: dict[str, Any]) -> RunConfig:
    """A model of three blocks on batches of 8 sequences; ``sections`` change settings, e.g. train={"clip": None}."""
    model = ModelConfig(
        plan=plan,
        width=32,
        depth=3,
        heads=4,
        ffn_width=64,
        vocab_size=VOCABULARY,
        context=LENGTH,
        init=InitConfig(std="fan_in", embedding_std=1.0),
        embedding_scale="none",
    )
    config = RunConfig(
        seed=7,
        device="cpu",
        model=model,
        data=DataConfig(sequence_length=LENGTH),
        train=TrainConfig(steps=30, batch_tokens=SEQUENCES * LENGTH),
        optimizer=OptimizerConfig(name=optimizer, lr=LEARNING_RATES[optimizer], weight_decay=0.1),  # type: ignore[arg-type]
        parallel=ParallelConfig(),
        precision=PrecisionConfig(),
    )
    return replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()})


def here() -> World:
    """This process among those that tests/ranks.py started, or alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return World(0, 1, torch.device("cpu"))
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)


def batch_of(step: int) -> torch.Tensor:
    """The global batch of a step, int64 [sequences, length + 1]: half noise, half repetition, so that losses fall."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    rows[:, 1::2] = (rows[:, 0:-1:2] * 5 + 1) % VOCABULARY
    return rows


def advance(engine: Engine, config: RunConfig, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    world = here()
    counts = derive_counts(config, world.size)
    found = []
    for step in steps:
        mine = batch_of(step)[world.rank :: world.size]
        loss, norm = train_step(engine, mine, step, config, counts, world, eos=0)
        found.append((world.sum(loss.clone()).item(), norm.item()))
    return found


def train(config: RunConfig, steps: int = 10) -> list[tuple[float, float]]:
    """A fresh engine through the first ``steps`` steps."""
    torch.manual_seed(0)
    engine = build_engine(config, here())
    engine.initialize()
    return advance(engine, config, range(steps))


def train_all(configs: dict[Any, RunConfig], steps: int = 10) -> dict[Any, list[tuple[float, float]]]:
    """Several trainings in the same processes, which take long to start."""
    return {key: train(config, steps) for key, config in configs.items()}
