from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.data import EvaluationSet, Loader, batch_hash


class Numbers:
    """Sample i is i, i+1, …; reading may take time, or fail at a sample."""

    vocabulary = 1000
    eos = 0
    tokenizer_path = Path("none")
    validation: EvaluationSet | None = None

    def __init__(self, length: int = 4, seconds: float = 0.0, fails_at: int | None = None) -> None:
        self.length, self.seconds, self.fails_at = length, seconds, fails_at
        self.last = -1

    def read(self, indices: Sequence[int]) -> np.ndarray:
        time.sleep(self.seconds)
        if self.fails_at is not None and self.fails_at in indices:
            raise ConfigError("the disk is gone")
        self.last = max(indices)
        return np.array([np.arange(i, i + self.length + 1) for i in indices], np.int64)

    def state(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state(self, state: dict[str, Any]) -> None:
        self.last = state["last"]


def take(loader: Loader, steps: int) -> list[Any]:
    with loader:
        return [next(loader) for _ in range(steps)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_any_world_size_reads_the_same_global_batches(world_size: int) -> None:
    batch_size, steps = 12, 5
    expected = Numbers().read(range(3 * batch_size, (3 + steps) * batch_size)).reshape(steps, batch_size, -1)
    shares = [
        take(Loader(Numbers(), batch_size=batch_size, rank=r, world_size=world_size, first_step=3), steps)
        for r in range(world_size)
    ]
    for step in range(steps):
        rows = np.empty_like(expected[step])
        for rank, share in enumerate(shares):
            rows[rank::world_size] = share[step].tokens.numpy()
        assert np.array_equal(rows, expected[step])
        wrapped = np.array([share[step].hash for share in shares], np.int64).sum()
        assert int(wrapped) == batch_hash(expected[step])


@given(st.permutations(range(6)), st.integers(0, 5), st.integers(0, 4))
def test_hash_ignores_order_and_sees_every_token(order: list[int], row: int, column: int) -> None:
    rows = np.arange(30, dtype=np.int64).reshape(6, 5)
    assert batch_hash(rows[order]) == batch_hash(rows)
    changed = rows.copy()
    changed[row, column] += 1
    assert batch_hash(changed) != batch_hash(rows)


def test_the_state_is_that_after_the_batch_however_far_the_thread_is() -> None:
    with Loader(Numbers(), batch_size=4, prefetch=8) as loader:
        time.sleep(0.2)  # long enough for the thread to fill the queue
        assert [next(loader).state["last"] for _ in range(3)] == [3, 7, 11]


def test_the_consumer_waits_only_where_it_is_faster() -> None:
    slow = take(Loader(Numbers(seconds=0.05), batch_size=1, prefetch=2), 4)
    assert sum(batch.wait_seconds for batch in slow) > 0.1  # four reads of 0.05 s, less what was under way before
    waits = []
    with Loader(Numbers(seconds=0.01), batch_size=1, prefetch=4) as loader:
        for _ in range(10):
            time.sleep(0.05)  # the step
            waits.append(next(loader).wait_seconds)
    # a read takes a fifth of a step, so every batch is there; the median forgives one hiccup of a loaded machine
    assert sorted(waits)[5] < 0.005


def test_a_failure_in_the_thread_comes_at_its_step_and_stays() -> None:
    with Loader(Numbers(fails_at=9), batch_size=4) as loader:
        next(loader)
        next(loader)
        for _ in range(2):
            with pytest.raises(ConfigError, match="the disk is gone"):
                next(loader)


@pytest.mark.parametrize("consumed", [0, 1])
def test_closing_ends_the_thread_at_once(consumed: int) -> None:
    before = threading.active_count()
    loader = Loader(Numbers(), batch_size=2, prefetch=1)  # full: the thread stands at the queue
    for _ in range(consumed):
        next(loader)
    time.sleep(0.1)
    start = time.perf_counter()
    loader.close()
    assert time.perf_counter() - start < 1.0
    assert threading.active_count() == before
    loader.close()  # closing twice is fine
