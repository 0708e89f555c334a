"""A random order of 0..n-1 in constant memory: what stands at place i is computed, not looked up.

A Feistel network is a bijection on the pairs of half-words whatever its round function is (Luby and Rackoff, 1988). It
permutes the smallest even power of two that holds n; a value outside of 0..n-1 is put through again until it falls
inside (cycle walking; Black and Rogaway, 2002), fewer than four times on average.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


class Permutation:
    """A bijection of 0..n-1, chosen by ``seed`` (any sequence of non-negative integers)."""

    def __init__(self, n: int, seed: tuple[int, ...]) -> None:
        assert 1 <= n < 1 << 62
        self.n = n
        half_bits = max(1, -(-(n - 1).bit_length() // 2))
        self._shift = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        self._keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """int64 [...] in 0..n-1 -> int64 [...] in 0..n-1."""
        values = np.asarray(places).astype(np.uint64)
        assert values.size == 0 or values.max() < self.n
        values = self._encrypt(values)
        while (outside := values >= self.n).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._shift, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
