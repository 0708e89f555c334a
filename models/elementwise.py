"""DyT and its like: one function of each feature by itself, ``gain * f(alpha * x + shift) + beta``.

Settings of every one of them: ``alpha`` learned, fixed (at what ``model.alpha`` says for the site) or a number;
``gain`` and ``beta``, one number a feature; ``shift``, one number. The DyT paper's ablation without alpha is ``alpha:
1.0``. A fixed alpha is a number of the configuration: neither trained nor saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels
from models.norms import affine, gain_parameter, register
from models.precision import wide
from models.roles import Role


class Elementwise(nn.Module):
    """``gain * f(alpha * x + shift) + beta``; a function is a class with its ``f`` and what it has by default.

    alpha is one learnable scalar of shape (1,): FSDP2 rejects 0-d parameters. In fp32 autograd's ``1 - tanh^2``
    comes from an unrounded tanh; from a bf16 one it would be exactly 0 wherever ``|alpha * x| > 3.47``.
    """

    roles: ClassVar[dict[str, Role]] = {"weight": "gain", "bias": "shift", "alpha": "alpha", "shift": "shift"}
    has_beta: ClassVar[bool] = False
    has_shift: ClassVar[bool] = False
    bounded: ClassVar[bool] = True  # |f| never exceeds 1
    kernel: ClassVar[str | None] = None  # what models.kernels calls the function, if they have it
    fused = False
    # Where fused and unwatched, for readers that take something else than x's dtype: write(x) in place of kernels.dyt,
    # write(x, branch) in place of kernels.add_dyt.
    write: Callable[..., Any] | None = None

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        alpha: Literal["learned"] | float = "learned",
        gain: bool = True,
        beta: bool | None = None,
        shift: bool | None = None,
    ) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1)) if alpha == "learned" else alpha
        self.weight = gain_parameter(features, gain)
        self.bias = nn.Parameter(torch.zeros(features)) if (self.has_beta if beta is None else beta) else None
        self.shift = nn.Parameter(torch.zeros(1)) if (self.has_shift if shift is None else shift) else None

    def f(self, z: Tensor) -> Tensor:
        """The function itself, fp32 or fp64."""
        raise NotImplementedError

    def settings(self) -> tuple[Any, ...]:
        """What ``kernels.dyt`` needs to know beside x."""
        return self.alpha, self.weight, self.bias, self.shift, self.kernel

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """``x + branch`` and the function of it, by one kernel; for one that has a kernel and that nobody watches."""
        if self.write is not None:
            return cast(tuple[Tensor, Tensor], self.write(x, branch))
        return kernels.add_dyt(x, branch, *self.settings())

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and self.kernel is not None:
            if self.write is not None and not kernels.is_watched(self):
                return cast(Tensor, self.write(x))
            return kernels.dyt(x, *self.settings())
        z = self.alpha * wide(x)
        return affine(self.f(z if self.shift is None else z + self.shift), self.weight, self.bias).to(x.dtype)


@register("dyt")
class DyT(Elementwise):
    """``tanh(z)`` (arXiv 2503.10622). The paper's LLaMA has no beta."""

    kernel = "tanh"

    def f(self, z: Tensor) -> Tensor:
        return torch.tanh(z)


@register("derf")
class Derf(Elementwise):
    """``erf(z)`` (arXiv 2512.10938), with a scalar shift, initially 0, and a beta."""

    has_beta = has_shift = True
    kernel = "erf"

    def f(self, z: Tensor) -> Tensor:
        return torch.erf(z)


@register("hardtanh")
class HardTanh(Elementwise):
    """``min(max(z, -1), 1)`` (arXiv 2503.10622, section 6)."""

    def f(self, z: Tensor) -> Tensor:
        return F.hardtanh(z)


@register("sigmoid")
class Sigmoid(Elementwise):
    """``2 / (1 + exp(-z)) - 1``: shifted and stretched, so that it is 0 at 0 and bounded by -1 and 1.

    It equals ``tanh(z / 2)``: DyT with an alpha of half the size. ``logistic`` is the sigmoid as it is.
    """

    def f(self, z: Tensor) -> Tensor:
        return 2 * torch.sigmoid(z) - 1


@register("logistic")
class Logistic(Elementwise):
    """``1 / (1 + exp(-z))``, between 0 and 1: presumably what arXiv 2503.10622, section 6, calls sigmoid, whose result
    differs from tanh's (inferred: a shifted one with a learnable alpha is tanh)."""

    def f(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)


@register("softsign")
class Softsign(Elementwise):
    """``z / (1 + |z|)``."""

    def f(self, z: Tensor) -> Tensor:
        return F.softsign(z)


@register("isru")
class ISRU(Elementwise):
    """``z / sqrt(1 + z^2)``, the inverse square root unit; RMSNorm with one feature's own square in place of the mean
    (arXiv 2503.21708 derives it so, as DyISRU; this is the form of the Derf paper's code)."""

    def f(self, z: Tensor) -> Tensor:
        return z * torch.rsqrt(1 + z * z)


@register("identity")
class Identity(Elementwise):
    """``z``: nothing bounds it. The DyT paper's ablation, in which training failed (arXiv 2503.10622, section 6)."""

    bounded = False

    def f(self, z: Tensor) -> Tensor:
        return z
