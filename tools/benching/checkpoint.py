"""What saving and loading cost: in the step, beside it, and by torch.save and safetensors of the same state.

A save counts until the disk has it, a load from a disk whose files no memory holds until the values stand in the
model's own tensors. Under torchrun a time is the slowest rank's, and the peers, who know of no ranks, are left out.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.agreement import Ranks
from pretrain.checkpoint import Checkpointer, Saver, rng_state
from pretrain.config import RunConfig
from pretrain.distributed import World
from tools.benching.machine import DiskSpeed, copy_bandwidth, disk_speed, forget, size_of, sync
from tools.benching.ours import OurSteps
from tools.benching.report import Row, Table
from tools.benching.timing import alternate, wait

IN_STEP, HELD, WRITE = "in the step", "beside it: the step is held", "beside it: until it is committed"
QUIET, BESIDE = "a step", "a step beside a write"
TORCH, SAFETENSORS = "torch.save", "safetensors"
LOAD, TORCH_LOAD, SAFETENSORS_LOAD = "equipoise, checksums verified", "torch.load", "safetensors.load_file"
_WARMUP = 3  # steps


class Costs:
    """Measures in ``folder``. ``times``: seconds by what took them, as the names above; ``sizes``: bytes, likewise."""

    def __init__(self, config: RunConfig, world: World, folder: Path, steps: int) -> None:
        self._world, self._folder, self._quiet = world, folder, steps
        self._ranks = Ranks(world.control)
        self._training = OurSteps(config, world)
        group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._checkpointer = Checkpointer(folder / "equipoise", keep=1, keep_every=None, group=group)
        self._beside, self._within = (Saver(self._checkpointer, there, self._committed) for there in (True, False))
        self._committed_at = 0.0
        self.times: dict[str, list[float]] = {}
        self.sizes: dict[str, int] = {}
        self.disk: list[DiskSpeed] = []
        for _ in range(_WARMUP):
            self._training.step()

    def measure(self, rounds: int) -> None:
        """Every kind of save and load in each round, with training steps between them."""
        turns: dict[str, Callable[[], dict[str, float]]] = {"save in the step": self._save_within}
        turns["save beside the step"] = self._save_beside
        turns["load"] = self._load
        if self._world.size == 1:
            turns |= {"torch.save": self._torch, "safetensors": self._safetensors, "plain file": self._plain}
        names = list(turns)

        def turn(place: int, warming: bool) -> None:
            for name, seconds in turns[names[place]]().items():
                if not warming:
                    self.times.setdefault(name, []).append(seconds)

        alternate(names, turn, rounds)
        if self._world.size > 1 and self._world.is_main:
            self._plain()

    def close(self) -> None:
        self._training.close()

    def _timed(self, work: Callable[[], object]) -> float:
        """The slowest rank's seconds."""
        wait(self._world.device)
        began = time.perf_counter()
        work()
        wait(self._world.device)
        return max(self._ranks.together(lambda: time.perf_counter() - began))

    def _committed(self, line: str) -> None:
        self._committed_at = time.perf_counter()

    def _save(self, saver: Saver) -> None:
        saver.save(self._training.done, self._training.engine.tensors, {}, rng_state())

    def _save_within(self) -> dict[str, float]:
        self._training.step()
        seconds = self._timed(lambda: self._save(self._within))
        self.sizes[IN_STEP] = size_of(self._newest())
        return {IN_STEP: seconds}

    def _save_beside(self) -> dict[str, float]:
        """A step counts as beside the write only if every rank still writes at its end."""
        quiet = [self._timed(self._training.step) for _ in range(self._quiet)]
        began, during = time.perf_counter(), list[float]()
        held = self._timed(lambda: self._save(self._beside))
        while True:
            seconds = self._timed(self._training.step)
            if not all(self._ranks.together(lambda: self._beside.busy)):
                break
            during.append(seconds)
        self._beside.wait()
        written = max(self._ranks.together(lambda: self._committed_at - began))
        found = {HELD: held, WRITE: written, QUIET: median(quiet)}
        return found | ({BESIDE: median(during)} if during else {})

    def _load(self) -> dict[str, float]:
        forget(self._newest())

        def load() -> None:
            committed = self._checkpointer.latest()
            assert committed is not None, "a save came before"
            tensors = self._training.engine.tensors()
            self._checkpointer.load(committed, tensors)
            self._training.engine.restore(tensors)

        return {LOAD: self._timed(load)}

    def _torch(self) -> dict[str, float]:
        path = self._folder / "state.pt"

        def save() -> None:
            torch.save(self._training.engine.tensors(), path)
            sync(path)

        def load() -> None:
            loaded = torch.load(path, weights_only=True, map_location="cpu")
            _fill(_flat(self._training.engine.tensors()), _flat(loaded))

        return self._there_and_back(path, save, load, TORCH, TORCH_LOAD)

    def _safetensors(self) -> dict[str, float]:
        from safetensors.torch import load_file, save_file

        path = self._folder / "state.safetensors"

        def save() -> None:
            save_file({name: t.contiguous() for name, t in _flat(self._training.engine.tensors()).items()}, path)
            sync(path)

        def load() -> None:
            _fill(_flat(self._training.engine.tensors()), load_file(path))

        return self._there_and_back(path, save, load, SAFETENSORS, SAFETENSORS_LOAD)

    def _there_and_back(
        self, path: Path, save: Callable[[], None], load: Callable[[], None], name: str, back: str
    ) -> dict[str, float]:
        saved = self._timed(save)
        self.sizes[name] = size_of(path)
        forget(path)
        loaded = self._timed(load)
        path.unlink()
        return {name: saved, back: loaded}

    def _plain(self) -> dict[str, float]:
        self.disk.append(disk_speed(self._folder, self.sizes[IN_STEP]))
        return {}

    def _newest(self) -> Path:
        return max((self._folder / "equipoise").glob("step-*"))


def measure(config: RunConfig, world: World, folder: Path, rounds: int, steps: int) -> Costs:
    """In ``folder``, which has to be empty, and is again afterwards: ``steps`` quiet steps before each save beside."""
    costs = Costs(config, world, folder, steps)
    try:
        costs.measure(rounds)
    finally:
        costs.close()
        if world.is_main:
            shutil.rmtree(folder / "equipoise", ignore_errors=True)
    return costs


def tables(costs: Costs) -> list[Table]:
    """The limits: the same bytes in a plain file, and, where the step is only held, copied in the CPU's memory."""
    write, read = (median(speed) for speed in zip(*costs.disk, strict=True))
    size, memory = costs.sizes[IN_STEP], copy_bandwidth(torch.device("cpu"))

    def rows(names: tuple[str, ...], speed: float, sizes: dict[str, int]) -> list[Row]:
        found = []
        for name in names:
            seconds, own = costs.times.get(name, []), sizes.get(name, size)
            limit = 2 * own / memory if name == HELD else own / speed
            found.append(Row(name, seconds, limit, {"GB": own / 1e9} if seconds else {}, "several ranks"))
        return found

    back = {LOAD: size, TORCH_LOAD: costs.sizes.get(TORCH, size), SAFETENSORS_LOAD: costs.sizes.get(SAFETENSORS, size)}
    quiet = costs.times[QUIET]
    steps = [Row(QUIET, quiet), Row(BESIDE, costs.times.get(BESIDE, []), why="no write outlasted a step")]
    return [
        Table(
            f"Saving; a plain file takes {write / 1e9:.3g} GB/s",
            "s",
            rows((IN_STEP, HELD, WRITE, TORCH, SAFETENSORS), write, costs.sizes),
            is_cost=True,
        ),
        Table(
            f"Loading; a plain file gives {read / 1e9:.3g} GB/s",
            "s",
            rows((LOAD, TORCH_LOAD, SAFETENSORS_LOAD), read, back),
            is_cost=True,
        ),
        Table("Training beside a write", "s", steps, is_cost=True),
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dictionaries, by their path."""
    found: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
    return found


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
