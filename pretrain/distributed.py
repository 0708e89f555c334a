"""Who this process is among its ranks. Nothing else in the house reads RANK or WORLD_SIZE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from models.errors import ConfigError


@dataclass(frozen=True)
class World:
    """One process's place. ``control`` is a gloo group for decisions, so that agreeing never waits for the device;
    it is None in a single process."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a tensor on the device, in place; no host synchronization."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def rank_in_environment() -> int:
    return int(os.environ.get("RANK", "0"))


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but no GPU is visible here; write --device cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined(device: str, timeout: timedelta = timedelta(minutes=10)) -> Iterator[World]:
    """Join the ranks that torchrun started, or be the only one; leave on exit.

    ``device`` is auto, cpu or cuda. Collectives that outlast ``timeout`` raise, so that a dead rank is no hang.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"srun started {tasks} tasks that do not know of each other: start one task a node, and torchrun in it"
        )
    place = _device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, place)
        return
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout)
    try:
        yield World(dist.get_rank(), size, place, dist.new_group(backend="gloo", timeout=timeout))
        dist.barrier()
    finally:
        dist.destroy_process_group()
