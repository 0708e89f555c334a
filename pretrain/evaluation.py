"""Loss and bits per byte on held-out text."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from models.loss import IGNORE
from pretrain.batch import Batch, document_numbers
from pretrain.data import EvaluationSet
from pretrain.distributed import World
from pretrain.engines.protocol import Engine


class Evaluation(NamedTuple):
    loss: float  # nats a target
    bits_per_byte: float


def evaluate(
    engine: Engine,
    held_out: EvaluationSet,
    world: World,
    batch: int,
    sequences: int | None = None,
    mask_eos: int | None = None,
) -> Evaluation:
    """The mean loss over ``held_out``, or over ``sequences`` of its windows spread evenly.

    ``bits_per_byte`` is total nats / ln 2 / bytes of text; of a part of the windows, the bytes are the targets' share
    of the whole's. With ``mask_eos`` attention stays within the documents that this token ends, as in training with
    data.document_mask; every token stays a target, so that the figures of all runs compare.

    Ranks take windows in turn, ``batch`` at a time, and run equally many forwards: where windows run out, a rank's
    rows have no targets.
    """
    count = held_out.count if sequences is None else min(sequences, held_out.count)
    chosen = [i * held_out.count // count for i in range(count)]
    nll = torch.zeros((), dtype=torch.float64, device=world.device)
    targets = torch.zeros_like(nll)
    for begin in range(0, count, batch * world.size):
        mine = chosen[begin + world.rank : begin + batch * world.size : world.size]
        inputs, wanted = held_out.read(mine or chosen[:1])
        if not mine:
            wanted = np.full_like(wanted, IGNORE)
        short = batch - len(inputs)  # one shape throughout, so that a compiled model is compiled once
        inputs = np.pad(inputs, ((0, short), (0, 0)))
        wanted = np.pad(wanted, ((0, short), (0, 0)), constant_values=IGNORE)
        tokens = torch.from_numpy(inputs).to(world.device)
        documents = None if mask_eos is None else document_numbers(tokens, mask_eos)
        rows = Batch(tokens, torch.from_numpy(wanted).to(world.device), documents)
        nll += engine.evaluate(rows)
        targets += rows.targets.ne(IGNORE).sum()
    world.sum(nll)
    world.sum(targets)
    total, seen = nll.item(), targets.item()
    covered = held_out.bytes * seen / held_out.tokens
    return Evaluation(total / seen, total / math.log(2) / covered)
