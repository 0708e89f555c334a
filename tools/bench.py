"""Throughput of a configuration's training step beside nanoGPT's, or another configuration's, on this machine.

    python -m tools.bench configs/tiny.yaml --pairs 7 --steps 5 --output bench.jsonl
    python -m tools.bench configs/tiny.yaml --model.plan llama --against configs/tiny.yaml

All that is compared is alive at once and takes turns, so that what else the machine does falls on all alike; ratios
are of two measurements in the same round. A step is all that training does in it: the loader's batch, forward,
backward, clipping, update. Against nanoGPT (tools/nanogpt.py) there are two contenders in each precision, eager and
compiled: the configuration's own model and optimizer, and "stack", nanoGPT's model built from ours with AdamW, whose
ratio shows what loss, loader and optimizer give at an identical parameter count. Only GELU's form differs (tanh or
exact). Micro-batches, accumulation and data are the configuration's for all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch._dynamo
from rich.console import Console
from rich.progress import Progress

from models import ConfigError, ModelConfig
from models.errors import nearest
from pretrain.batch import make_batch
from pretrain.cli import load
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.counts import Counts, derive_counts
from pretrain.data import Loader, open_source
from pretrain.data.manifest import read_manifest
from pretrain.distributed import World, joined
from pretrain.engines import build_engine
from pretrain.optimizers import learning_rate_fraction
from pretrain.run import environment
from pretrain.trainer import resolve_vocabulary
from tools.command import run
from tools.nanogpt import NanoGPT, NanoGPTLoop

_WARMUP = 2  # steps before the first round: compilation, allocations, the optimizer's state
_SETTLE = 1  # untimed steps at each turn: caches, and the loader's queue, which filled up while others had theirs

# precision and compilation, by the names that the command line and the table use
VARIANTS = {
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
    "fp32+compile": ("fp32", True),
    "bf16+compile": ("bf16", True),
}


class Steps(Protocol):
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
    base: int  # the contender that this one's ratio is to, by its place


class OurSteps:
    """The trainer's step without its bookkeeping: the engine, the loader, and the calls between them."""

    def __init__(self, config: RunConfig, world: World, name: str, variant: str) -> None:
        self._config, self._world = config, world
        self._counts = derive_counts(config, world.size)
        torch.manual_seed(config.seed)
        self._engine = build_engine(config, world)
        self._source = open_source(replace(config.data, verify=False), config.seed)
        self._loader = Loader(
            self._source,
            batch_size=self._counts.sequences,
            prefetch=config.data.prefetch,
            pin_memory=world.device.type == "cuda",
        )
        self._targets = torch.full((), float(self._counts.batch_tokens), device=world.device)
        self._step = 0

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self._engine.model.parameters())

    def step(self) -> None:
        config, counts = self._config, self._counts
        tokens = next(self._loader).tokens.to(self._world.device, non_blocking=True)
        parts = tokens.split(counts.micro_batch)
        for i, part in enumerate(parts, 1):
            batch = make_batch(part, self._source.eos, config.data.document_mask)
            self._engine.accumulate(batch, self._targets, last=i == len(parts))
        fraction = learning_rate_fraction(min(self._step, counts.steps - 1), counts.steps, config.schedule)
        self._engine.step(config.optimizer.lr * fraction)
        self._step += 1

    def close(self) -> None:
        self._loader.close()
