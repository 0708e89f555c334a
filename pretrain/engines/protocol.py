"""What the loop needs of whatever holds the model. It cannot tell which engine answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.optimizers import NormGuard


class Engine(Protocol):
    """A model with its optimizer, spread over the ranks or not. Before use, ``initialize`` or ``restore`` it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    shapes: dict[str, torch.Size]  # of every parameter as a whole, by its canonical name
    settings: dict[str, Any]  # of the library behind it, derived from the configuration; empty if it has none
    guard: NormGuard | None  # what decides which steps are left out, if train.skip_norm_sigma asks for it

    def describe(self) -> list[str]:
        """What the settings amount to, for the start of a run: a line each."""

    def initialize(self) -> None:
        """First weights, the same tensor for tensor under any world size and engine."""

    def accumulate(self, batch: Batch, targets: Tensor, last: bool) -> Tensor:
        """Forward and backward of this rank's next micro-batch.

        ``targets`` is the number of target tokens in the global batch, fp32 [] on the device: every target weighs the
        same, however ranks and micro-batches divide them. ``last`` marks the step's last micro-batch. Returns this
        rank's summed negative log-likelihood in nats, fp32 [] on the device, without a host synchronization.
        """

    def scale_alphas(self, factor: float) -> None:
        """Multiply every parameter of role alpha, before a step's forward."""

    def step(self, lr: float) -> Tensor:
        """Clip by the global norm, update, forget the gradients. Returns the norm before clipping, fp32 []. Where the
        guard says so, nothing moves."""

    def evaluate(self, batch: Batch) -> Tensor:
        """This rank's summed negative log-likelihood in nats, fp32 [], without dropout or gradients. All ranks call
        it equally often."""

    def measure_alpha(self, batch: Batch, target: float) -> dict[str, float]:
        """models.initialization.measure_alpha on ``batch``, the same on all ranks."""

    def observe(self, batch: Batch, watch: Callable[[nn.Module], Any]) -> Any:
        """One forward of ``batch`` without gradients inside the context manager that ``watch(model)`` makes; returns
        what the manager yields."""

    def tensors(self) -> dict[str, Any]:
        """Weights and optimizer state under the model's own names, for torch.distributed.checkpoint, sharing storage
        where it can. Loading into it and handing it to ``restore`` sets both."""

    def restore(self, tensors: dict[str, Any]) -> None: ...
