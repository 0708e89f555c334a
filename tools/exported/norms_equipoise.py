"""The functions that can stand at the sites of an Equipoise model, and the sites."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SITES = (
    "embed",
    *("attn_in", "query", "key", "value", "attn_mid", "attn_out", "attn_post"),
    *("mlp_in", "mlp_act", "mlp_mid", "mlp_out", "mlp_post"),
    "final",
)


def wide(x: Tensor) -> Tensor:
    """Half precision -> fp32: norms compute there, whatever the dtype of the model."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def gain_or_none(features: int, present: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.ones(features)) if present else None


class RMSNorm(nn.Module):
    """``gain * x / sqrt(mean(x^2) + eps)`` (arXiv 1910.07467)."""

    def __init__(self, features: int, eps: float, gain: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = gain_or_none(features, gain)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else wide(self.weight)
        return F.rms_norm(wide(x), x.shape[-1:], weight, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """``gain * (x - mean) / sqrt(var + eps) (+ shift)`` (arXiv 1607.06450)."""

    def __init__(self, features: int, eps: float, bias: bool, gain: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = gain_or_none(features, gain)
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else wide(self.weight)
        bias = None if self.bias is None else wide(self.bias)
        return F.layer_norm(wide(x), x.shape[-1:], weight, bias, self.eps).to(x.dtype)


class L2Norm(nn.Module):
    """``x / max(|x|, eps)``: unit length, no parameters."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(wide(x), dim=-1, eps=self.eps).to(x.dtype)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dyt": torch.tanh,  # arXiv 2503.10622
    "derf": torch.erf,  # arXiv 2512.10938
    "hardtanh": F.hardtanh,
    "sigmoid": lambda z: 2 * torch.sigmoid(z) - 1,
    "logistic": torch.sigmoid,
    "softsign": F.softsign,
    "isru": lambda z: z * torch.rsqrt(1 + z * z),
    "identity": lambda z: z,
}


class Elementwise(nn.Module):
    """``gain * f(alpha * x + shift) + beta``: no normalization, but one of ``FUNCTIONS`` of each feature by itself.

    gain and beta are one number a feature, shift is one number; alpha is one too, learned or fixed.
    """

    def __init__(self, function: str, features: int, alpha: str | float, gain: bool, beta: bool, shift: bool) -> None:
        super().__init__()
        self.function = function
        self.alpha = nn.Parameter(torch.ones(1)) if alpha == "learned" else float(alpha)
        self.weight = gain_or_none(features, gain)
        self.bias = nn.Parameter(torch.zeros(features)) if beta else None
        self.shift = nn.Parameter(torch.zeros(1)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.alpha * wide(x)
        y = FUNCTIONS[self.function](z if self.shift is None else z + self.shift)
        y = y if self.weight is None else self.weight * y
        return (y if self.bias is None else y + self.bias).to(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
    "l2norm": L2Norm,
    **{function: partial(Elementwise, function) for function in FUNCTIONS},
}


def norm(sites: dict[str, Any], site: str, features: int) -> nn.Module | None:
    """The function that stands at ``site``; None is the identity."""
    if site not in sites:
        return None
    settings = dict(sites[site])
    return NORMS[settings.pop("function")](features, **settings)


def through(function: nn.Module | None, x: Tensor) -> Tensor:
    """``function(x)``, or x where there is none."""
    return x if function is None else function(x)
