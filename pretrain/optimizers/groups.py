"""From parameters and their roles to an optimizer whose groups know what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from models.errors import ConfigError, nearest
from pretrain.config import OptimizerConfig
from pretrain.optimizers.adamw import CompactAdamW
from pretrain.optimizers.msgdw import MSGDW, check_range

_DECAYING_ROLES = ("matrix", "embedding", "head")
_STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LARGE_FOR_ADAMW = 0.05  # every weight would move by about this much in every step


def build_optimizer(
    named_parameters: Mapping[str, nn.Parameter], roles: Mapping[str, str], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """mSGDW or AdamW over one group per role.

    ``roles`` maps every name of ``named_parameters`` to its role. A group carries, beside torch's own keys,
    ``role``, ``lr_factor``, ``weight_decay`` (0 where the role does not decay) and ``param_names``; its ``lr``
    is the peak until :func:`set_learning_rate` is called. AdamW is torch's fused one, or with bf16 states
    :class:`CompactAdamW`.

    Raises:
        ConfigError: a setting out of range, or a role in ``decay_roles`` or ``lr_factors`` that no parameter has.
    """
    present = sorted(set(roles.values()))
    _validate(config, present)
    decaying = _DECAYING_ROLES if config.decay_roles is None else config.decay_roles
    groups: dict[tuple[str, Any], dict[str, Any]] = {}
    for name, parameter in named_parameters.items():
        role = roles[name]
        # A fused kernel takes no mixture of plain tensors and DTensors, nor DTensors of several meshes.
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        if (role, mesh) not in groups:
            factor = config.lr_factors.get(role, 1.0)
            groups[role, mesh] = {
                "params": [],
                "role": role,
                "lr_factor": factor,
                "lr": config.lr * factor,
                "weight_decay": config.weight_decay if role in decaying else 0.0,
            }
        groups[role, mesh]["params"].append((name, parameter))
    for group in groups.values():
        if group["lr"] * group["weight_decay"] >= 1.0:
            raise ConfigError(
                f"optimizer.lr {group['lr']:g} (of role {group['role']}) times optimizer.weight_decay "
                f"{config.weight_decay:g} is 1 or more: one step would decay the weights to nothing, lower either"
            )
    if config.name == "adamw":
        betas = (config.beta1, config.beta2)
        if config.state_dtype == "fp32":
            return torch.optim.AdamW(list(groups.values()), lr=config.lr, betas=betas, eps=config.eps, fused=True)
        return CompactAdamW(
            list(groups.values()), lr=config.lr, betas=betas, eps=config.eps, state_rounding=config.state_rounding
        )
    return MSGDW(
        list(groups.values()),
        lr=config.lr,
        momentum=config.momentum,
        dampening=config.dampening,
        nesterov=config.nesterov,
        state_dtype=_STATE_DTYPES[config.state_dtype],
        state_rounding=config.state_rounding,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate: ``lr`` times the factor of its role."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def describe(optimizer: torch.optim.Optimizer, config: OptimizerConfig, sizes: Mapping[str, int]) -> list[str]:
    """What the settings amount to at the peak learning rate: a headline, then a line for each role.

    The effective step of mSGDW is what a constant gradient is multiplied by in the end,
    lr · (1 - dampening) / (1 - momentum), with and without Nesterov. The effective decay is the share of a
    weight that one step takes away, lr · weight decay. Counts are of the whole model, not of this rank's shard.
    """
    stored = f"stored in {config.state_dtype}"
    if config.state_dtype == "bf16":
        stored += " rounded to nearest" if config.state_rounding == "nearest" else " rounded stochastically"
    if config.name == "adamw":
        betas = f"betas {config.beta1:g} and {config.beta2:g}"
        lines = [f"AdamW: {betas}, moments {stored}, eps {config.eps:g}, lr {config.lr:g}"]
    else:
        variant = "Nesterov" if config.nesterov else "no Nesterov"
        lines = [
            f"mSGDW: momentum {config.momentum:g} {stored}, dampening {config.dampening:g}, {variant}, lr {config.lr:g}"
        ]
    roles = dict.fromkeys(group["role"] for group in optimizer.param_groups)
    for role in roles:
        groups = [group for group in optimizer.param_groups if group["role"] == role]
        count = sum(sizes[name] for group in groups for name in group["param_names"])
        lr, decay = config.lr * groups[0]["lr_factor"], groups[0]["weight_decay"]
        line = f"  {role:<9}  {count:>13,} parameters  lr {lr:g}"
        if config.name == "msgdw":
            line += f"  effective step {lr * (1.0 - config.dampening) / (1.0 - config.momentum):g}"
        lines.append(f"{line}  weight decay {decay:g}  effective decay {lr * decay:g} per step")
    if config.name == "adamw" and config.lr > _LARGE_FOR_ADAMW:
        lines.append(f"  lr {config.lr:g} is mSGDW's scale; AdamW usually takes 1e-4 to 1e-2: set optimizer.lr too")
    return lines


def _validate(config: OptimizerConfig, present: list[str]) -> None:
    """The roles and what both optimizers share; MSGDW checks its own settings, torch's messages name no key."""
    for key, names in (("decay_roles", config.decay_roles or ()), ("lr_factors", config.lr_factors)):
        for role in names:
            if role not in present:
                raise ConfigError(
                    f"optimizer.{key} names {role!r}, a role of no parameter of this model: {nearest(role, present)}"
                )
    if config.state_dtype not in _STATE_DTYPES:
        raise ConfigError(f"optimizer.state_dtype is {config.state_dtype!r}: write fp32 or bf16")
    for role, factor in config.lr_factors.items():
        check_range(f"optimizer.lr_factors.{role}", factor)
    check_range("optimizer.lr", config.lr)
    check_range("optimizer.weight_decay", config.weight_decay)
    check_range("optimizer.beta1", config.beta1, below=1.0)
    check_range("optimizer.beta2", config.beta2, below=1.0)
    check_range("optimizer.eps", config.eps)
