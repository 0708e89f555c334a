"""What the blocks' linears make of their weights: use them as they are, standardize them, or divide by their norm.

Each is a subclass of ``nn.Linear`` whose parameters keep their names and shapes, so that initialization, sharding and
optimizers see matrices. The weight that multiplies is made anew in every forward, from parameters that are whole there
(FSDP and ZeRO gather them first). Embedding and head are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.precision import wide
from models.roles import Role


class _LinearBy(torch.autograd.Function):
    """``x W^T`` by a weight ``W = make(*sources)`` that is made again in the backward.

    Autograd would keep one for every linear of the model, beside the parameters, which FSDP frees in between. Compiled
    code needs no such help: its partitioner knows that parameters are there anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(x, *sources)
        return F.linear(x, make(*sources).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *sources = ctx.saved_tensors
        trained = [place for place, wanted in enumerate(ctx.needs_input_grad[2:]) if wanted]
        with torch.enable_grad():
            sources = [source.detach().requires_grad_(place in trained) for place, source in enumerate(sources)]
            weight = ctx.make(*sources)
        grads: list[Tensor | None] = [None] * len(sources)
        if trained:
            grad_weight = (grad.flatten(0, -2).mT @ x.flatten(0, -2)).to(weight.dtype)
            found = torch.autograd.grad(weight, [sources[place] for place in trained], grad_weight)
            for place, value in zip(trained, found, strict=True):
                grads[place] = value
        return grad @ weight.detach().to(x.dtype), None, *grads


def _linear(x: Tensor, make: Callable[..., Tensor], *sources: Tensor, bias: Tensor | None) -> Tensor:
    """In autocast's dtype if it is on, as ``F.linear`` does by itself."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        if torch.compiler.is_compiling():
            y = F.linear(x, make(*sources).to(x.dtype))
        else:
            y = _LinearBy.apply(x, make, *sources)
        return y if bias is None else y + bias.to(y.dtype)


class StandardizedLinear(nn.Linear):
    """Scaled weight standardization (arXiv 2101.08692): each row of the weight with mean 0 and norm ``gamma * gain``.

    ::

        W_ij  ->  gamma * gain_i * (W_ij - mean_i) / sqrt(max(N * var_i, 1e-4))        over the N inputs of row i

    so that inputs of unit variance give outputs of unit variance. The gain is learned, one a row, initially 1. gamma is
    a constant that undoes what an activation before the linear does to the variance (:data:`AFTER_ACTIVATION`). The
    epsilon and its place are those of the paper's code.
    """

    roles: ClassVar[dict[str, Role]] = {"gain": "gain"}

    def __init__(self, in_features: int, out_features: int, bias: bool, gamma: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.gamma = gamma
        self.gain = nn.Parameter(torch.ones(out_features))

    def _weight(self, weight: Tensor, gain: Tensor) -> Tensor:
        w = wide(weight)
        variance, mean = torch.var_mean(w, dim=1, keepdim=True, correction=0)
        scale = torch.rsqrt((variance * w.shape[1]).clamp(min=1e-4)) * (self.gamma * gain.unsqueeze(1))
        return (w - mean) * scale

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self._weight, self.weight, self.gain, bias=self.bias)


POWER_ITERATIONS = 8


def _start(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A vector that looks like noise and is the same everywhere, so that no weight is likely to be orthogonal to it."""
    place = torch.arange(length, device=device)
    return (place * place * 40503 % 65537 / 65537 - 0.5).to(dtype)


@torch.no_grad()
def leading_vectors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors u, v with ``u^T W v`` near the largest singular value of W [rows, columns], by power iteration."""
    v = _start(weight.shape[1], weight.device, weight.dtype)
    for _ in range(POWER_ITERATIONS):
        v = F.normalize(weight.mT.mv(F.normalize(weight.mv(v), dim=0)), dim=0)
    return F.normalize(weight.mv(v), dim=0), v


class SigmaLinear(nn.Linear):
    """sigmaReparam (arXiv 2303.06296): the weight times ``gamma / sigma``, its spectral norm, with a learned gamma.

    gamma is one number, here ``gain``, initially 1 as in the paper. (The authors' code starts it at sigma, which for
    their weights of std 0.02 is 1.1 at width 768.) sigma is ``u^T W v`` with u and v from power iteration and without a
    gradient of their own, as in that code, which keeps u between steps and iterates once a forward. Here every forward
    makes ``POWER_ITERATIONS`` of them from the same start: the result is a function of the weight alone, resumes bit
    for bit, is the same under accumulation and recomputation, and needs no buffer to be saved. It costs
    2 * POWER_ITERATIONS + 2 products of the weight with a vector. sigma is exact to 0.1 % where the largest singular
    value is at least 1.5 times the next, and about 5 % too small for Gaussian weights, whose largest ones lie close
    together (widths 512 to 4096); gamma makes up for a constant factor.
    """

    roles: ClassVar[dict[str, Role]] = {"gain": "gain"}

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.gain = nn.Parameter(torch.ones(1))

    @staticmethod
    def _weight(weight: Tensor, gain: Tensor, u: Tensor, v: Tensor) -> Tensor:
        w = wide(weight)
        return w * (gain / (u @ (w @ v)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            u, v = leading_vectors(self.weight)
        return _linear(x, self._weight, self.weight, self.gain, wide(u), wide(v), bias=self.bias)


# What makes the variance of an activation of standard normal inputs 1 again. gelu (tanh form): 1 / its standard
# deviation, since standardized rows take no notice of its mean; swiglu: silu(a) * b of two inputs, whose mean is 0.
AFTER_ACTIVATION = {"gelu": 1.70092, "swiglu": 1.67653}


def build_linear(
    weights: str, in_features: int, out_features: int, bias: bool, activation: str | None = None
) -> nn.Linear:
    """A linear as ``model.weights`` has it; ``activation`` names what its inputs come from."""
    if weights == "standardized":
        gamma = 1.0 if activation is None else AFTER_ACTIVATION[activation]
        return StandardizedLinear(in_features, out_features, bias, gamma)
    if weights == "sigma":
        return SigmaLinear(in_features, out_features, bias)
    return nn.Linear(in_features, out_features, bias=bias)
