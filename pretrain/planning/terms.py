"""Bytes by what they are for: terms that add up and can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Terms:
    """What a rank holds, in bytes. A difference of two may have negative terms."""

    parameters: float = 0.0
    gathered: float = 0.0  # parameters gathered from the other ranks, or copied into the compute type
    gradients: float = 0.0
    optimizer: float = 0.0  # its moments, and ZeRO's copy of the parameters
    activations: float = 0.0
    loss: float = 0.0  # final norm, a chunk of logits, gradients of the head's weight and input
    communication: float = 0.0  # buffers of collectives
    step: float = 0.0  # what the optimizer needs while it steps

    @property
    def total(self) -> float:
        return sum(astuple(self))

    def __add__(self, other: Terms) -> Terms:
        return self._with(other, lambda mine, theirs: mine + theirs)

    def __sub__(self, other: Terms) -> Terms:
        return self._with(other, lambda mine, theirs: mine - theirs)

    def _with(self, other: Terms, combine: Callable[[float, float], float]) -> Terms:
        return Terms(*map(combine, astuple(self), astuple(other)))
