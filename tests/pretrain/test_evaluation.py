"""Validation is a plain loop over cross-entropies, whatever the batch and the world size; bits per byte by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import Transformer
from models.config import ModelConfig
from models.initialization import initialize
from models.loss import IGNORE
from pretrain.batch import Batch
from pretrain.config import DataConfig, RunConfig, TrainConfig
from pretrain.data import EvaluationSet
from pretrain.distributed import World
from pretrain.engines import build_engine
from pretrain.evaluation import Evaluation, evaluate
from tests.ranks import run_ranks

LENGTH, VOCABULARY, EOS = 8, 61, 2
WINDOWS = 7  # of which the last is filled up; 2 ranks x 2 and 3 ranks x 2 both run out within a round
TOKENS = (WINDOWS - 1) * LENGTH + 3  # targets
BYTES = 2 * TOKENS
WORLD = World(0, 1, torch.device("cpu"))
COMBINATIONS: list[tuple[int, int | None, int | None]] = [  # batch, sequences, mask_eos
    *((1, None, None), (2, None, None), (3, None, None), (100, None, None), (2, 3, None), (4, 5, None), (1, 99, None)),
    *((2, None, EOS), (3, 5, EOS)),
]

# fp32 losses of some 50 tokens, summed in another order.
TOLERANCE = 1e-6


def held_out() -> EvaluationSet:
    text = np.random.default_rng(0).integers(VOCABULARY, size=TOKENS + 1).astype(np.uint16)
    text[[2, 11, 12, 30, 39]] = EOS  # within windows, at their ends, one after another
    return EvaluationSet([text[:20], text[20:]], LENGTH, EOS, BYTES)


def small() -> RunConfig:
    return RunConfig(
        model=ModelConfig(width=32, depth=2, heads=4, ffn_width=40, vocab_size=VOCABULARY, context=LENGTH, dropout=0.5),
        data=DataConfig(sequence_length=LENGTH),
        train=TrainConfig(steps=1, batch_tokens=LENGTH, loss_chunk=5),
    )


def by_hand(windows: list[int], masked: bool) -> tuple[float, float]:
    """One window at a time through the logits, or one document of it at a time: every token stays a target."""
    model = Transformer(small().model).eval()
    initialize(model, small().model, seed=0)
    nats, targets = 0.0, 0
    for window in windows:
        inputs, wanted = (torch.from_numpy(tokens[0]) for tokens in held_out().read([window]))
        cuts = (inputs.eq(EOS).nonzero().flatten() + 1).tolist() if masked else []
        for text, following in zip(inputs.tensor_split(cuts), wanted.tensor_split(cuts), strict=True):
            if len(text):
                with torch.no_grad():
                    logits: Tensor = model(text[None])[0].double()
                nats += F.cross_entropy(logits, following, ignore_index=IGNORE, reduction="sum").item()
        targets += int(wanted.ne(IGNORE).sum())
    return nats / targets, nats / math.log(2) / (BYTES * targets / TOKENS)


def chosen(sequences: int | None) -> list[int]:
    return {None: list(range(7)), 99: list(range(7)), 3: [0, 2, 4], 5: [0, 1, 2, 4, 5]}[sequences]


def all_combinations(world: World) -> list[Evaluation]:
    engine = build_engine(small(), world)
    engine.initialize()
    return [evaluate(engine, held_out(), world, *combination) for combination in COMBINATIONS]


def on_this_rank() -> list[Evaluation]:
    return all_combinations(World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_is_a_plain_loop(world_size: int) -> None:
    """Under every batch and world size, also where a rank's windows run out before another's, as at 3 ranks x 2."""
    ranks = [all_combinations(WORLD)] if world_size == 1 else run_ranks(on_this_rank, world_size)
    for found in ranks:
        for (batch, sequences, mask_eos), evaluation in zip(COMBINATIONS, found, strict=True):
            expected = by_hand(chosen(sequences), mask_eos is not None)
            assert tuple(evaluation) == pytest.approx(expected, rel=TOLERANCE), (batch, sequences, mask_eos)
        assert found == ranks[0], "ranks decide by what they agree on"


class Recorder:
    """An engine whose every target costs one bit; it keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def evaluate(self, batch: Batch) -> Tensor:
        self.batches.append(batch)
        return batch.targets.ne(IGNORE).sum() * math.log(2)


class Numbered:
    """Windows of one token, which is the window's number; one byte a token."""

    def __init__(self, count: int) -> None:
        self.count = self.tokens = self.bytes = count

    def read(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        rows = np.array(indices, np.int64).reshape(-1, 1)
        return rows, rows


@settings(deadline=None)  # the first example imports
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.none() | st.integers(1, 40))
def test_ranks_share_the_windows_and_run_equally_many_forwards(
    count: int, batch: int, world_size: int, sequences: int | None
) -> None:
    seen: list[int] = []
    forwards = set()
    for rank in range(world_size):
        engine: Any = Recorder()
        world: Any = SimpleNamespace(rank=rank, size=world_size, device=torch.device("cpu"), sum=lambda x: x.add_(1e-9))
        windows: Any = Numbered(count)
        evaluate(engine, windows, world, batch, sequences)
        forwards.add(len(engine.batches))
        for given_ in engine.batches:
            assert given_.inputs.shape == given_.targets.shape == (batch, 1), "one shape, one compilation"
            assert given_.documents is None
            seen += given_.targets[given_.targets.ne(IGNORE)].tolist()
    assert len(forwards) == 1
    wanted = count if sequences is None else min(count, sequences)
    assert len(seen) == wanted
    assert len(set(seen)) == wanted, "no window twice"
    gaps = np.diff([*sorted(seen), count])
    assert min(seen) == 0
    assert gaps.max() - gaps.min() <= 1, "spread evenly"


@pytest.mark.parametrize(("sequences", "targets"), [(None, TOKENS), (3, 3 * LENGTH)])
def test_bits_per_byte_by_hand(sequences: int | None, targets: int) -> None:
    """At one bit a target and two bytes of text a target, half a bit a byte; of a part as of the whole."""
    engine: Any = Recorder()
    evaluation = evaluate(engine, held_out(), WORLD, 2, sequences)
    assert sum(int(batch.targets.ne(IGNORE).sum()) for batch in engine.batches) == targets
    assert evaluation.loss == pytest.approx(math.log(2), rel=TOLERANCE)
    assert evaluation.bits_per_byte == pytest.approx(0.5, rel=TOLERANCE)
