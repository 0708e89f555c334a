"""Training samples from a prepared folder, each a pure function of (seed, sample index).

An epoch bends the tokens of the training split into a ring, cuts it at a random place, and from there on lays
T // sequence_length windows side by side; what is left of the ring, less than a window, differs from epoch to epoch.
A random permutation says in which order the windows come. Both depend on (seed, epoch) alone, and neither needs
memory, so that any sample can be read by anyone at any time and a restart has nothing to restore.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import ConfigError
from pretrain.data.manifest import open_split, read_manifest, tokenizer_path
from pretrain.data.permutation import Permutation
from pretrain.data.source import EvaluationSet, TokenArray


class PreparedSource:
    """A TokenSource over the memory-mapped shards of a folder made by tools.prepare.

    ConfigError if the folder is not committed, is damaged (contents are hashed if ``verify``, each rank a part), or
    its training split is shorter than one window.
    """

    def __init__(
        self,
        folder: str | Path,
        sequence_length: int,
        seed: int,
        *,
        verify: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.folder = Path(folder)
        self._manifest = read_manifest(self.folder)
        self._length = sequence_length
        self._seed = seed
        self._open = functools.partial(
            open_split, self.folder, self._manifest, verify=verify, rank=rank, world_size=world_size
        )
        self.vocabulary = self._manifest.vocabulary
        self.eos = self._manifest.eos
        self.tokenizer_path = tokenizer_path(self.folder, self._manifest)
        self._ring = TokenArray(self._open("train"))
        if len(self._ring) < sequence_length + 1:
            raise ConfigError(
                f"{self.folder} has {len(self._ring)} training tokens, fewer than one sample of data.sequence_length "
                f"{sequence_length} + 1: shorten it or prepare more text"
            )
        self.samples_per_epoch = len(self._ring) // sequence_length
        self.validation = self.evaluation("validation") if "validation" in self._manifest.splits else None
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)

    def evaluation(self, split: str) -> EvaluationSet:
        """A whole split to evaluate on: "validation", or "test" where the corpus has one."""
        return EvaluationSet(self._open(split), self._length, self.eos, self._manifest.splits[split].bytes)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        out = np.empty((len(indices), self._length + 1), np.int64)
        places = np.asarray(indices, np.int64)
        epochs = places // self.samples_per_epoch
        for epoch in np.unique(epochs):
            cut, order = self._epoch(int(epoch))
            rows = np.flatnonzero(epochs == epoch)
            windows = order(places[rows] % self.samples_per_epoch)
            for row, window in zip(rows, windows, strict=True):
                out[row] = self._read_ring((cut + int(window) * self._length) % len(self._ring))
        return out

    def _make_epoch(self, epoch: int) -> tuple[int, Permutation]:
        cut = np.random.default_rng((self._seed, epoch)).integers(len(self._ring))
        return int(cut), Permutation(self.samples_per_epoch, (self._seed, epoch, 1))

    def _read_ring(self, start: int) -> np.ndarray:
        before_end = min(self._length + 1, len(self._ring) - start)
        head = self._ring.read(start, before_end)
        if before_end == self._length + 1:
            return head
        return np.concatenate([head, self._ring.read(0, self._length + 1 - before_end)])

    def state(self) -> dict[str, Any]:
        return {"prepared": self._manifest.fingerprint}

    def load_state(self, state: dict[str, Any]) -> None:
        if state.get("prepared") != self._manifest.fingerprint:
            raise ConfigError(
                f"{self.folder} is not what the checkpoint was trained on (another text, tokenizer or setting): "
                "restore data.path, or start a run under a new name"
            )
