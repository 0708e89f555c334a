"""One optimizer step on one rank's rows, without what the trainer does around it."""

from __future__ import annotations

import torch
from torch import Tensor

from models.loss import IGNORE
from pretrain.batch import make_batch
from pretrain.config import RunConfig
from pretrain.counts import Counts
from pretrain.distributed import World
from pretrain.engines.protocol import Engine
from pretrain.optimizers import alpha_factor, learning_rate_fraction
from pretrain.telemetry.step_watch import StepWatch


def learning_rate(config: RunConfig, steps: int, step: int) -> float:
    """Of the optimizer step with this index, from 0, in a run of ``steps``."""
    return config.optimizer.lr * learning_rate_fraction(step, steps, config.schedule)


def train_step(
    engine: Engine,
    rows: Tensor,
    step: int,
    config: RunConfig,
    counts: Counts,
    world: World,
    eos: int,
    watch: StepWatch | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward and backward of every micro-batch, then the update with step ``step``'s learning rate; before it, alphas
    are scaled by the step's factor.

    ``rows``: this rank's int64 [sequences, length + 1]. Returns this rank's part of the global batch's mean loss and
    the global gradient norm before clipping, fp32 [] on the device: nothing here waits for it. ``watch`` looks on.
    """
    factor = alpha_factor(step, counts.steps, config.optimizer.alpha)
    if factor != 1.0:
        engine.scale_alphas(factor)
    masked = config.data.document_mask
    tokens = rows.to(world.device, non_blocking=True)
    batches = [make_batch(part, eos, masked) for part in tokens.split(counts.micro_batch)]
    if masked:  # which targets fall away differs between ranks
        targets = world.sum(torch.stack([b.targets.ne(IGNORE).sum() for b in batches]).sum().float())
    else:
        targets = torch.full((), float(counts.batch_tokens), device=world.device)
    nll = torch.zeros((), device=world.device)
    for i, batch in enumerate(batches, 1):
        nll += engine.accumulate(batch, targets, last=i == len(batches))
        if watch is not None:
            watch.accumulated(batch, first=i == 1, last=i == len(batches))
    norm = engine.step(learning_rate(config, counts.steps, step))
    if watch is not None:
        watch.updated()
    return nll / targets, norm
