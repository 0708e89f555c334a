"""What an optimizer's settings amount to, in lines for the start of a run."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch

from pretrain.config import AlphaControlConfig, OptimizerConfig
from pretrain.optimizers.groups import rule_of
from pretrain.optimizers.muon import lr_adjustment

_OWN_SETTINGS = {
    "msgdw": ("momentum", "dampening", "nesterov"),
    "adamw": ("beta1", "beta2", "eps"),
    "lion": ("lion",),
    "muon": ("muon",),
    "sgd-sai": ("momentum", "eps"),
}
_NAMES = {"msgdw": "mSGDW", "adamw": "AdamW", "lion": "Lion", "muon": "Muon", "sgd-sai": "SGD-SaI"}
# Above the first, and every weight would move by about as much in every step; what is usual, beside it. SGD-SaI's is
# multiplied by the root of a tensor's elements, by some thousands.
_LARGE = {"adamw": (0.05, "1e-4 to 1e-2"), "lion": (0.01, "1e-5 to 1e-3"), "sgd-sai": (0.02, "1e-5 to 1e-2")}


def describe(optimizer: torch.optim.Optimizer, config: OptimizerConfig, sizes: Mapping[str, int]) -> list[str]:
    """What the settings amount to at the peak learning rate: a headline, then a line for each role.

    The effective step is what a constant gradient is multiplied by in the end (mSGDW:
    lr · (1 - dampening) / (1 - momentum), with and without Nesterov), or what an element moves by (Lion, Muon). The
    effective decay is the share of a weight that one step takes away, lr · weight decay. Counts are of the whole
    model, not of this rank's shard.
    """
    stored = f"stored in {config.state_dtype}"
    if config.state_dtype == "bf16":
        stored += " rounded to nearest" if config.state_rounding == "nearest" else " rounded stochastically"
    lines = [f"{_headline(config.name, config, stored)}, lr {config.lr:g}"]
    if config.name == "muon":
        lines.append(f"  roles other than matrix: {_headline(config.muon.others, config, stored)}")
    for role in dict.fromkeys(group["role"] for group in optimizer.param_groups):
        groups = [group for group in optimizer.param_groups if group["role"] == role]
        count = sum(sizes[name] for group in groups for name in group["param_names"])
        lr, decay = config.lr * groups[0]["lr_factor"], groups[0]["weight_decay"]
        line = f"  {role:<9}  {count:>13,} parameters  lr {lr:g}{_step(role, lr, groups, config)}"
        lines.append(f"{line}  weight decay {decay:g}  effective decay {lr * decay:g} per step")
    return [*lines, *_alphas(config.alpha), *_doubts(config)]


def _headline(rule: str, config: OptimizerConfig, stored: str) -> str:
    match rule:
        case "adamw":
            return f"AdamW: betas {config.beta1:g} and {config.beta2:g}, moments {stored}, eps {config.eps:g}"
        case "lion":
            return f"Lion: betas {config.lion.beta1:g} and {config.lion.beta2:g}, moment {stored}"
        case "muon":
            muon = config.muon
            return f"Muon: momentum {muon.momentum:g} {stored}, Nesterov, learning rates by {muon.adjust_lr}"
        case "sgd-sai":
            return f"SGD-SaI: momentum {config.momentum:g} {stored}, averaged, eps {config.eps:g}"
    variant = "Nesterov" if config.nesterov else "no Nesterov"
    return f"mSGDW: momentum {config.momentum:g} {stored}, dampening {config.dampening:g}, {variant}"


def _step(role: str, lr: float, groups: list[dict[str, Any]], config: OptimizerConfig) -> str:
    match rule_of(role, config):
        case "msgdw":
            return f"  effective step {lr * (1.0 - config.dampening) / (1.0 - config.momentum):g}"
        case "lion":
            return f"  each element moves by {lr:g}"
        case "sgd-sai":
            return f"  effective step {lr:g} x the tensor's g-SNR"
        case "muon":
            shapes = [parameter.shape for group in groups for parameter in group["params"]]
            # Singular values are near 1, so that the elements' root mean square is near 1/sqrt(max(rows, columns)).
            moves = [lr * lr_adjustment(shape, config.muon.adjust_lr) / sqrt(max(shape)) for shape in shapes]
            ends = dict.fromkeys(f"{move:.3g}" for move in (min(moves), max(moves)))
            return f"  elements move by {' to '.join(ends)} (root mean square)"
    return ""


def _alphas(config: AlphaControlConfig) -> list[str]:
    lines = []
    if config.multiplier is not None and config.multiplier_steps is not None:
        (begin, end), (first, last) = config.multiplier, config.multiplier_steps
        lines.append(f"  alphas times {begin:g} until step {first}, times {end:g} from step {last} on")
    if config.bounds is not None:
        lines.append(f"  alphas stay between {config.bounds[0]:g} and {config.bounds[1]:g}")
    if config.clip is not None:
        lines.append(f"  alphas' gradients together are clipped to norm {config.clip:g}, before all gradients are")
    return lines


def _doubts(config: OptimizerConfig) -> list[str]:
    """Settings that mean nothing here, and a learning rate of another optimizer's scale."""
    used = {key for name in (config.name, rule_of("head", config)) for key in _OWN_SETTINGS[name]}
    default = OptimizerConfig()
    lines = [
        f"  optimizer.{key} does nothing with optimizer.name {config.name}"
        for key in dict.fromkeys(key for keys in _OWN_SETTINGS.values() for key in keys)
        if key not in used and getattr(config, key) != getattr(default, key)
    ]
    rule, lr = rule_of("head", config), config.lr
    if config.name == "muon" and config.muon.others_lr is not None:
        lr = config.muon.others_lr
    largest, usual = _LARGE.get(rule, (float("inf"), ""))
    if lr > largest:
        key = "optimizer.lr" if config.name == rule else "optimizer.muon.others_lr"
        lines.append(f"  lr {lr:g} is mSGDW's scale; {_NAMES[rule]} usually takes {usual}: set {key} too")
    return lines
