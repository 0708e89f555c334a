"""How weights move: the optimizers, their groups by role, the learning rate over time."""

from pretrain.optimizers.adamw import CompactAdamW
from pretrain.optimizers.groups import build_optimizer, describe, set_learning_rate
from pretrain.optimizers.msgdw import MSGDW
from pretrain.optimizers.schedules import learning_rate_fraction

__all__ = ["MSGDW", "CompactAdamW", "build_optimizer", "describe", "learning_rate_fraction", "set_learning_rate"]
