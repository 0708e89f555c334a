"""How weights move: the optimizers, their groups by role, the learning rate over time, alphas and steps left out."""

from pretrain.optimizers.adamw import CompactAdamW
from pretrain.optimizers.alphas import alpha_factor
from pretrain.optimizers.description import describe
from pretrain.optimizers.groups import build_optimizer, rule_of, set_learning_rate
from pretrain.optimizers.guard import NormGuard
from pretrain.optimizers.lion import Lion
from pretrain.optimizers.msgdw import MSGDW
from pretrain.optimizers.muon import Muon
from pretrain.optimizers.schedules import learning_rate_fraction
from pretrain.optimizers.sgdsai import SGDSaI

__all__ = [
    "MSGDW",
    "CompactAdamW",
    "Lion",
    "Muon",
    "NormGuard",
    "SGDSaI",
    "alpha_factor",
    "build_optimizer",
    "describe",
    "learning_rate_fraction",
    "rule_of",
    "set_learning_rate",
]
