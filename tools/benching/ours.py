"""Our own training step, as the trainer takes it and without what the trainer does around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from models import parameter_roles
from pretrain.config import RunConfig
from pretrain.counts import derive_counts
from pretrain.data import Loader, open_source
from pretrain.distributed import World
from pretrain.engines import Engine, build_engine
from pretrain.engines.fsdp import FSDPEngine
from pretrain.step import train_step
from pretrain.telemetry import MetricsWriter
from pretrain.telemetry.inspection import Inspection


class OurSteps:
    """What the trainer does in a step, without what it does around it: the same engine, loader and calls. Steps that
    log.inspect_every asks for are inspected, and what is found is written, in a folder that goes with ``close``."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config, self._world = config, world
        self._counts = derive_counts(config, world.size)
        torch.manual_seed(config.seed)
        self.engine = build_engine(config, world)
        set_weights(self.engine, world.device)
        self._source = open_source(replace(config.data, verify=False), config.seed, world.rank, world.size)
        self.loader = Loader(
            self._source,
            batch_size=self._counts.sequences,
            rank=world.rank,
            world_size=world.size,
            prefetch=config.data.prefetch,
            pin_memory=world.device.type == "cuda",
        )
        self._inspection = Inspection(config, self._counts, self.engine, world, self._source.eos)
        self.folder: TemporaryDirectory[str] | None = None
        if config.log.inspect_every:
            self.folder = TemporaryDirectory(prefix="equipoise-bench-")
            self._metrics = MetricsWriter(Path(self.folder.name), config.log.tensorboard, 0)
        self.waited = 0.0
        self.done = 0

    def step(self) -> None:
        batch = next(self.loader)
        self.waited += batch.wait_seconds
        step = min(self.done, self._counts.steps - 1)  # a benchmark may be longer than the run
        self.done += 1
        rows, watch = batch.tokens, self._inspection.of_step(self.done)
        train_step(self.engine, rows, step, self._config, self._counts, self._world, self._source.eos, watch)
        if watch is not None:
            self._metrics.write(self.done, self._inspection.read(watch, rows))

    def close(self) -> None:
        self.loader.close()
        if self.folder is not None:
            self._metrics.close()
            self.folder.cleanup()


def set_weights(engine: Engine, device: torch.device) -> None:
    """The trainer's own first weights on a CPU. On a GPU random ones drawn there: the trainer's are drawn on the host,
    20 s a billion, and speed does not depend on them."""
    if device.type == "cpu" or not isinstance(engine, FSDPEngine) or any(True for _ in engine.model.buffers()):
        engine.initialize()
        return
    draw_weights(engine.model)


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Matrices from a normal distribution, gains and scales 1, alphas 0.5, all else 0, on the device where they are."""
    flat = {"gain": 1.0, "scale": 1.0, "alpha": 0.5}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(flat.get(roles[name], 0.0))
