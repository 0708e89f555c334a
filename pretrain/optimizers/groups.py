"""From parameters and their roles to an optimizer whose groups know what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from models.errors import ConfigError, nearest
from pretrain.config import AlphaControlConfig, OptimizerConfig
from pretrain.optimizers import alphas
from pretrain.optimizers.adamw import CompactAdamW
from pretrain.optimizers.lion import Lion
from pretrain.optimizers.msgdw import MSGDW, check_range
from pretrain.optimizers.muon import Muon
from pretrain.optimizers.sgdsai import SGDSaI

_DECAYING_ROLES = ("matrix", "embedding", "head")
_STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(
    named_parameters: Mapping[str, nn.Parameter], roles: Mapping[str, str], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimizer that ``config.name`` names, over one group per role.

    ``roles`` maps every name of ``named_parameters`` to its role. A group carries, beside torch's own keys,
    ``role``, ``lr_factor``, ``weight_decay`` (0 where the role does not decay) and ``param_names``; its ``lr``
    is the peak until :func:`set_learning_rate` is called. AdamW is torch's fused one, or with bf16 states
    :class:`CompactAdamW`.

    Raises:
        ConfigError: a setting out of range, or one about a role that no parameter has.
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
            factor = _lr_factor(role, config)
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
    return _construct(list(groups.values()), config)


def _construct(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    storage: dict[str, Any] = {
        "state_dtype": _STATE_DTYPES[config.state_dtype],
        "state_rounding": config.state_rounding,
    }
    betas = (config.beta1, config.beta2)
    match config.name:
        case "msgdw":
            return MSGDW(
                groups,
                lr=config.lr,
                momentum=config.momentum,
                dampening=config.dampening,
                nesterov=config.nesterov,
                **storage,
            )
        case "adamw" if config.state_dtype == "fp32":
            return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        case "adamw":
            return CompactAdamW(groups, lr=config.lr, betas=betas, eps=config.eps, **storage)
        case "lion":
            return Lion(groups, lr=config.lr, betas=(config.lion.beta1, config.lion.beta2), **storage)
        case "sgd-sai":
            return SGDSaI(groups, lr=config.lr, momentum=config.momentum, eps=config.eps, **storage)
    rules: dict[str, dict[str, Any]] = {
        "muon": Muon.settings(config.muon.momentum, config.muon.adjust_lr),
        "adamw": {"betas": betas, "eps": config.eps},
        "msgdw": MSGDW.settings(config.momentum, config.dampening, config.nesterov),
    }
    for group in groups:
        rule = rule_of(group["role"], config)
        group |= {"rule": rule, **rules[rule]}
    return Muon(groups, lr=config.lr, **storage)


def rule_of(role: str, config: OptimizerConfig) -> Literal["msgdw", "adamw", "lion", "muon", "sgd-sai"]:
    """The optimizer that moves parameters of a role."""
    return config.muon.others if config.name == "muon" and role != "matrix" else config.name


def _lr_factor(role: str, config: OptimizerConfig) -> float:
    factor = config.lr_factors.get(role, 1.0)
    others_lr = config.muon.others_lr
    if config.name == "muon" and role != "matrix" and others_lr is not None:
        factor *= others_lr / config.lr
    return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate: ``lr`` times the factor of its role."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def _validate(config: OptimizerConfig, present: list[str]) -> None:
    """What names a role or is shared; optimizers check their own settings, but for torch's, which names no key."""
    for key, names in (("decay_roles", config.decay_roles or ()), ("lr_factors", config.lr_factors)):
        for role in names:
            if role not in present:
                raise ConfigError(
                    f"optimizer.{key} names {role!r}, a role of no parameter of this model: {nearest(role, present)}"
                )
    alphas.validate(config.alpha)
    if config.alpha != AlphaControlConfig() and "alpha" not in present:
        raise ConfigError("optimizer.alpha is about parameters of role alpha, and this model has none: leave it out")
    if config.name == "muon" and "matrix" not in present:
        raise ConfigError("optimizer.name muon is about parameters of role matrix, and this model has none")
    if config.state_dtype not in _STATE_DTYPES:
        raise ConfigError(f"optimizer.state_dtype is {config.state_dtype!r}: write fp32 or bf16")
    for role, factor in config.lr_factors.items():
        check_range(f"optimizer.lr_factors.{role}", factor)
    check_range("optimizer.lr", config.lr)
    check_range("optimizer.weight_decay", config.weight_decay)
    check_range("optimizer.beta1", config.beta1, below=1.0)
    check_range("optimizer.beta2", config.beta2, below=1.0)
    check_range("optimizer.eps", config.eps)
    if config.muon.others_lr is not None:
        check_range("optimizer.muon.others_lr", config.muon.others_lr)
        if config.name == "muon" and not config.lr:
            raise ConfigError("optimizer.muon.others_lr with optimizer.lr 0: write a positive optimizer.lr")
