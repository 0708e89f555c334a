"""The training step that the peers of tools.bench share: theirs are the model, its loss and what is compiled.

Random windows of a memory map, fetched while the forward's results are under way (nanoGPT's way, which none of the
others beats), autocast, gradient accumulation, clipping in every step, torch's AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class Windows:
    """Inputs and targets, int64 [``rows``, ``length``] on the device, at random places of a file of token ids."""

    def __init__(self, file: Path, dtype: str, length: int, rows: int, device: torch.device) -> None:
        self._file, self._dtype = file, dtype
        self._length, self._rows = length, rows
        self._device = device

    def fetch(self) -> tuple[Tensor, Tensor]:
        tokens = np.memmap(self._file, dtype=self._dtype, mode="r")  # anew each time, or the pages read stay resident
        offsets = torch.randint(len(tokens) - self._length, (self._rows,)).tolist()
        rows = torch.stack([torch.from_numpy(tokens[i : i + self._length + 1].astype(np.int64)) for i in offsets])
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if self._device.type != "cuda":
            return inputs, targets
        return (
            inputs.pin_memory().to(self._device, non_blocking=True),
            targets.pin_memory().to(self._device, non_blocking=True),
        )


class Loop:
    """Optimizer steps of ``accumulation`` micro-batches each.

    ``loss``: the mean cross-entropy, fp32 [], of inputs and targets; it uses ``model``'s parameters, which
    ``optimizer`` moves. ``bf16`` is autocast. ``waited``: seconds that the host has spent on making batches.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        windows: Windows,
        device: torch.device,
        *,
        accumulation: int,
        bf16: bool,
    ) -> None:
        self._weights = list(model.parameters())
        self._loss, self._optimizer, self._windows = loss, optimizer, windows
        self._device, self._accumulation, self._bf16 = device, accumulation, bf16
        self.waited = 0.0
        self._next = self._fetch()

    def _fetch(self) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        batch = self._windows.fetch()
        self.waited += time.perf_counter() - began
        return batch

    def step(self) -> None:
        for _ in range(self._accumulation):
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                loss = self._loss(*self._next) / self._accumulation
            self._next = self._fetch()
            loss.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Nothing is left running."""
