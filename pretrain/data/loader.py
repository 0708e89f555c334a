"""The rows of each global batch that one rank trains on, made ahead of the step by a background thread."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from pretrain.data.source import TokenSource

_POLL_SECONDS = 0.05
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class RankBatch:
    """A rank's share of a global batch.

    ``tokens``: int64 [batch_size / world_size, sequence_length + 1] on the CPU. ``state``: the source's, after this
    batch. ``hash``: of the rows, as an int64; summed over the ranks with wrap-around it is the global batch's, whatever
    the world size. ``wait_seconds``: how long the consumer had to wait for it.
    """

    tokens: torch.Tensor
    state: dict[str, Any]
    hash: int
    wait_seconds: float


class Loader:
    """Iterates over the steps from ``first_step`` on, without end.

    Global batch k is the samples k*batch_size .. (k+1)*batch_size - 1; this rank reads those whose index leaves the
    remainder ``rank`` by ``world_size``, in order. The source must be in the state it had after step first_step - 1.
    Use it in a ``with`` block, or close it. What goes wrong in the thread is raised by ``next``.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        assert batch_size % world_size == 0, (batch_size, world_size)
        assert 0 <= rank < world_size, (rank, world_size)
        assert prefetch >= 1
        self._source = source
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._pin_memory = pin_memory
        self._ready: queue.Queue[RankBatch | Exception] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._produce, args=(first_step,), name="loader", daemon=True)
        self._thread.start()

    def _produce(self, step: int) -> None:
        while not self._stop.is_set():
            item: RankBatch | Exception
            try:
                item = self._make(step)
            except Exception as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    pass
            if isinstance(item, Exception):
                return
            step += 1

    def _make(self, step: int) -> RankBatch:
        first = step * self._batch_size
        rows = self._source.read(range(first + self._rank, first + self._batch_size, self._world_size))
        tokens = torch.from_numpy(rows)
        if self._pin_memory:
            tokens = tokens.pin_memory()
        return RankBatch(tokens, self._source.state(), batch_hash(rows), 0.0)

    def __iter__(self) -> Iterator[RankBatch]:
        return self

    def __next__(self) -> RankBatch:
        if self._failure is not None:
            raise self._failure
        assert not self._stop.is_set(), "the loader is closed"
        start = time.perf_counter()
        item = self._ready.get()
        if isinstance(item, Exception):
            self._failure = item
            raise item
        return RankBatch(item.tokens, item.state, item.hash, time.perf_counter() - start)

    def close(self) -> None:
        """Stop the thread. It ends after the batch that it is making; a source that hangs is left behind."""
        self._stop.set()
        self._thread.join(timeout=_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def batch_hash(rows: np.ndarray) -> int:
    """The wrapping int64 sum of a 63-bit hash of every row: independent of the rows' order and distribution."""
    total = sum(
        int.from_bytes(hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=8).digest(), "little") >> 1
        for row in rows
    )
    return int(np.array(total % (1 << 64), np.uint64).astype(np.int64))
