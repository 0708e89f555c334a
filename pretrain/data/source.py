"""What the trainer reads: a numbered sequence of samples to train on, and a split to evaluate on.

Which tokens sample i holds depends on the seed and on i. Ranks, micro-batches and restarts decide who reads a
sample, never what is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models.loss import IGNORE


class TokenSource(Protocol):
    """Samples by their numbers; PreparedSource and StreamingSource are two."""

    vocabulary: int
    eos: int
    tokenizer_path: Path
    validation: EvaluationSet | None

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The samples with these global indices, int64 [len(indices), sequence_length + 1].

        A sample's inputs are its tokens without the last, its targets those without the first.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Where the next read goes on, as JSON can write it. The union over the ranks is the whole state."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from the union of the ranks' states. ConfigError if it is another source's."""
        ...


class EvaluationSet:
    """A split in its own order, cut into windows: every token but the first is a target exactly once.

    ``count`` windows, ``tokens`` targets in them, ``bytes`` of UTF-8 text behind them; with the sum of the targets'
    losses in nats, bits per byte = nats / ln 2 / bytes. The ends of documents are targets too, and add no bytes.
    """

    def __init__(self, shards: Sequence[np.ndarray], sequence_length: int, eos: int, bytes: int) -> None:
        self._text = TokenArray(shards)
        assert len(self._text) > 1, "nothing to predict"
        self._length = sequence_length
        self._eos = eos
        self.bytes = bytes
        self.tokens = len(self._text) - 1
        self.count = -(-self.tokens // sequence_length)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of these windows, both int64 [len(indices), sequence_length].

        The last window is filled up with inputs EOS and targets IGNORE.
        """
        inputs = np.full((len(indices), self._length), self._eos, np.int64)
        targets = np.full((len(indices), self._length), IGNORE, np.int64)
        for row, index in enumerate(indices):
            start = index * self._length
            count = min(self._length, self.tokens - start)
            assert 0 <= index < self.count, index
            tokens = self._text.read(start, count + 1)
            inputs[row, :count] = tokens[:-1]
            targets[row, :count] = tokens[1:]
        return inputs, targets


class TokenArray:
    """Arrays of tokens, read as if they were one."""

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        self._arrays = list(arrays)
        self._starts = np.cumsum([0, *(len(array) for array in self._arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """int64 [count]: the tokens from ``start`` on, all of which must exist."""
        assert 0 <= start <= len(self) - count, (start, count, len(self))
        out = np.empty(count, np.int64)
        done = 0
        k = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < count:
            part = self._arrays[k][start + done - self._starts[k] :][: count - done]
            out[done : done + len(part)] = part
            done += len(part)
            k += 1
        return out
