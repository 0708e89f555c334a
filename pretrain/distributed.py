"""Joining the other ranks, and this process's place among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.rendezvous import rendezvous

from models.errors import ConfigError
from pretrain.config import ParallelConfig
from pretrain.heap import keep_heap
from pretrain.rank import adopted
from pretrain.watchdog import Phase, Watchdog

_MARGIN = 60.0  # seconds that torch's own timeout is longer than the watch's, which can name the rank


@dataclass(frozen=True)
class World:
    """One process's place. ``control`` is a gloo group for decisions, so that agreeing never waits for the device;
    it is None in a single process, which has no ``watchdog`` either. ``local_size``: ranks on every
    node; 0 where nodes differ, None where all ranks are on one."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    watchdog: Watchdog | None = None
    local_size: int | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def at(self, step: int, phase: Phase) -> None:
        """Let the other ranks know what this one is about to do, in which step (from 1)."""
        if self.watchdog is not None:
            self.watchdog.at(step, phase)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a tensor on the device, in place; no host synchronization."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def group_of_one(world: World) -> None:
    """A process group for a single process, for libraries that know of nothing less. ``joined`` destroys it."""
    if world.size == 1 and not dist.is_initialized():
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group(_backend(world.device), store=HashStore(), rank=0, world_size=1)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _local_size(size: int, control: dist.ProcessGroup) -> int:
    sizes = [0] * size
    dist.all_gather_object(sizes, int(os.environ.get("LOCAL_WORLD_SIZE", size)), group=control)
    return sizes[0] if len(set(sizes)) == 1 else 0


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but no GPU is visible here; write --device cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined(device: str, parallel: ParallelConfig | None = None) -> Iterator[World]:
    """Join the ranks that torchrun or srun started, or be the only one; leave on exit.

    ``device`` is auto, cpu or cuda. With ``parallel`` the ranks watch each other: if one dies or hangs, all end. An
    error leaves this context only where it is a rank's own. Without, collectives that outlast ten minutes raise.
    """
    os.environ |= adopted()
    place = _device(device)
    if place.type == "cpu":
        keep_heap()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        try:
            yield World(0, 1, place)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return
    timeout = timedelta(minutes=10) if parallel is None else timedelta(seconds=parallel.timeout + _MARGIN)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(_backend(place), store=store, rank=rank, world_size=size, timeout=timeout)
    watchdog = None if parallel is None else Watchdog(store, rank, size, parallel.silence, parallel.timeout)
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        yield World(rank, size, place, control, watchdog, _local_size(size, control))
        dist.barrier()
    except BaseException as error:
        if watchdog is not None:
            watchdog.failed(error)
        raise
    finally:
        if watchdog is not None:
            watchdog.leave()
        dist.destroy_process_group()
