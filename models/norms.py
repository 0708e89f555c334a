"""The norms that can stand at a site, one short class each, and the registry that names these and elementwise.py's.

To add one, write a class with ``__init__(self, features, *, eps, **settings)``, declare its parameters' roles, and
decorate it with its name; every plan, override and tool can then use it. Whatever the dtype of the input, the
arithmetic and the parameters are fp32, and the output has the dtype of the input.

``gain: false`` leaves out a function's gain: for studies of what it does, and where it was folded into the next linear.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels
from models.errors import ConfigError, nearest
from models.precision import wide
from models.roles import Role

NORMS: dict[str, type[nn.Module]] = {}


def register(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """The decorator that enters a class into ``NORMS``."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        assert name not in NORMS, f"norm {name!r} is registered twice"
        NORMS[name] = cls
        return cls

    return add


def build_norm(name: str, features: int, settings: Mapping[str, Any], site: str) -> nn.Module:
    """The function ``name`` over the last axis of size ``features``; ``site`` is named in errors."""
    if name not in NORMS:
        raise ConfigError(f"model.sites.{site}: no function is called {name!r}; {nearest(name, NORMS)}")
    accepted = [p for p in inspect.signature(NORMS[name]).parameters if p != "features"]
    for key in settings:
        if key not in accepted:
            raise ConfigError(f"model.sites.{site}: {name} has no setting {key!r}; {nearest(key, accepted)}")
    return NORMS[name](features, **settings)


def gain_parameter(features: int, present: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.ones(features)) if present else None


def affine(y: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """``gain * y + shift``, of each what there is."""
    y = y if gain is None else gain * y
    return y if shift is None else y + shift


class _RMSNormOnCPU(torch.autograd.Function):
    """F.rms_norm is a chain of operations on the CPU. Its gradient is that of LayerNorm, which is one fused kernel
    there, with the mean held at 0: what LayerNorm's loses with the mean's own gradient is added back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        y = x * scale
        return y if gain is None else y.mul_(gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, gain, scale = ctx.saved_tensors
        wanted = [True, gain is not None, False]
        grad_x, grad_gain, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], torch.zeros_like(scale), scale, gain, None, wanted
        )
        total = grad.sum(-1) if gain is None else grad @ gain
        return grad_x.add_(total.unsqueeze(-1).mul_(scale).div_(x.shape[-1])), grad_gain, None


@register("rmsnorm")
class RMSNorm(nn.Module):
    """``gain * x / sqrt(mean(x^2) + eps)`` (arXiv 1910.07467)."""

    roles: ClassVar[dict[str, Role]] = {"weight": "gain"}
    fused = False

    def __init__(self, features: int, *, eps: float, gain: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = gain_parameter(features, gain)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return kernels.rms_norm(x, self.weight, self.eps)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNormOnCPU.apply(wide(x), self.weight, self.eps).to(x.dtype)
        return F.rms_norm(wide(x), x.shape[-1:], self.weight, self.eps).to(x.dtype)


@register("layernorm")
class LayerNorm(nn.Module):
    """``gain * (x - mean) / sqrt(var + eps) + shift`` (arXiv 1607.06450); without the shift by default."""

    roles: ClassVar[dict[str, Role]] = {"weight": "gain", "bias": "shift"}

    def __init__(self, features: int, *, eps: float, bias: bool = False, gain: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = gain_parameter(features, gain)
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(wide(x), x.shape[-1:], self.weight, self.bias, self.eps).to(x.dtype)


@register("l2norm")
class L2Norm(nn.Module):
    """``x / max(|x|, eps)``: unit length, no parameters (as nGPT's query and key normalization)."""

    def __init__(self, features: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(wide(x), dim=-1, eps=self.eps).to(x.dtype)
