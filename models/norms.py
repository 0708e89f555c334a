"""The functions that can stand at a norm site, one short class each, and the registry that names them.

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

from models.errors import ConfigError, nearest
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


def _fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _gain(features: int, present: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.ones(features)) if present else None


def _affine(y: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
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

    def __init__(self, features: int, *, eps: float, gain: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _gain(features, gain)

    def forward(self, x: Tensor) -> Tensor:
        wide = _fp32(x)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNormOnCPU.apply(wide, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(wide, x.shape[-1:], self.weight, self.eps).to(x.dtype)


@register("layernorm")
class LayerNorm(nn.Module):
    """``gain * (x - mean) / sqrt(var + eps) + shift`` (arXiv 1607.06450); without the shift by default."""

    roles: ClassVar[dict[str, Role]] = {"weight": "gain", "bias": "shift"}

    def __init__(self, features: int, *, eps: float, bias: bool = False, gain: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _gain(features, gain)
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(_fp32(x), x.shape[-1:], self.weight, self.bias, self.eps).to(x.dtype)


@register("l2norm")
class L2Norm(nn.Module):
    """``x / max(|x|, eps)``: unit length, no parameters (as nGPT's query and key normalization)."""

    def __init__(self, features: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(_fp32(x), dim=-1, eps=self.eps).to(x.dtype)


@register("dyt")
class DyT(nn.Module):
    """``gain * tanh(alpha * x) (+ beta)`` (arXiv 2503.10622). The paper's LLaMA has no beta.

    alpha is one learnable scalar of shape (1,): FSDP2 rejects 0-d parameters. In fp32 autograd's ``1 - tanh^2``
    comes from an unrounded tanh; from a bf16 one it would be exactly 0 wherever ``|alpha * x| > 3.47``.
    """

    roles: ClassVar[dict[str, Role]] = {"weight": "gain", "bias": "shift", "alpha": "alpha"}

    def __init__(self, features: int, *, eps: float, beta: bool = False, gain: bool = True) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.weight = _gain(features, gain)
        self.bias = nn.Parameter(torch.zeros(features)) if beta else None

    def forward(self, x: Tensor) -> Tensor:
        return _affine(torch.tanh(self.alpha * _fp32(x)), self.weight, self.bias).to(x.dtype)


@register("derf")
class Derf(nn.Module):
    """``gain * erf(alpha * x + shift) (+ beta)`` with a scalar shift, initially 0 (arXiv 2512.10938)."""

    roles: ClassVar[dict[str, Role]] = {"weight": "gain", "bias": "shift", "alpha": "alpha", "shift": "shift"}

    def __init__(self, features: int, *, eps: float, beta: bool = True, gain: bool = True) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))
        self.weight = _gain(features, gain)
        self.bias = nn.Parameter(torch.zeros(features)) if beta else None

    def forward(self, x: Tensor) -> Tensor:
        return _affine(torch.erf(self.alpha * _fp32(x) + self.shift), self.weight, self.bias).to(x.dtype)
