"""Checkpoints: committed or not there at all, loadable under any world size."""

from __future__ import annotations

from pretrain.checkpoint.checkpointer import Checkpointer
from pretrain.checkpoint.rng import restore_rng_state, rng_state
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.verification import Committed

__all__ = ["Checkpointer", "Committed", "Saver", "restore_rng_state", "rng_state"]
