"""What a branch of an Equipoise model has beside its norms: linears that make their weights, and how it joins the
residual stream."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.exported.configuration_equipoise import EquipoiseConfig
from tools.exported.norms_equipoise import wide


class MadeLinear(nn.Module):
    """A linear that multiplies by a weight which each forward makes of its parameters.

    It is no nn.Linear: quantization and adapters take the weight of one as it is.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, gains: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.gain = nn.Parameter(torch.ones(gains))

    def made(self) -> Tensor:
        """The weight that multiplies, fp32 or wider."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.made()
        return F.linear(x, weight.to(x.dtype), self.bias)


class StandardizedLinear(MadeLinear):
    """Scaled weight standardization (arXiv 2101.08692): each row of the weight with mean 0 and norm ``gamma * gain``.

    gamma undoes what an activation before the linear does to the variance.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, gamma: float) -> None:
        super().__init__(in_features, out_features, bias, gains=out_features)
        self.gamma = gamma

    def made(self) -> Tensor:
        w = wide(self.weight)
        variance, mean = torch.var_mean(w, dim=1, keepdim=True, correction=0)
        scale = torch.rsqrt((variance * w.shape[1]).clamp(min=1e-4)) * self.gamma
        return (w - mean) * scale * wide(self.gain).unsqueeze(1)


class SigmaLinear(MadeLinear):
    """sigmaReparam (arXiv 2303.06296): the weight times ``gain / sigma``, its spectral norm by power iteration.

    The iteration begins with the same vector in every forward, so that the result is a function of the weight alone.
    """

    iterations = 8

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias, gains=1)

    def made(self) -> Tensor:
        w = wide(self.weight)
        with torch.no_grad():
            place = torch.arange(w.shape[1], device=w.device)
            v = (place * place * 40503 % 65537 / 65537 - 0.5).to(w.dtype)  # like noise, but the same everywhere
            for _ in range(self.iterations):
                v = F.normalize(w.mT.mv(F.normalize(w.mv(v), dim=0)), dim=0)
            u = F.normalize(w.mv(v), dim=0)
        return w * (wide(self.gain) / (u @ (w @ v)))


# 1 / standard deviation of what the activation makes of standard normal inputs; of two of them for SwiGLU
AFTER_ACTIVATION = {"gpt": 1.70092, "llama": 1.67653}


def linear(config: EquipoiseConfig, in_features: int, out_features: int, after_activation: bool = False) -> nn.Module:
    """A linear of a branch, as ``config.weights`` has it."""
    if config.weights == "standardized":
        gamma = AFTER_ACTIVATION[config.trunk] if after_activation else 1.0
        return StandardizedLinear(in_features, out_features, config.bias, gamma)
    if config.weights == "sigma":
        return SigmaLinear(in_features, out_features, config.bias)
    return nn.Linear(in_features, out_features, bias=config.bias)


class Residual(nn.Module):
    """Both joints of a block with the residual stream; branch 0 is attention, branch 1 the feed-forward."""

    def __init__(self, config: EquipoiseConfig, layer: int) -> None:
        super().__init__()
        self.scheme, self.constant = config.residual, config.residual_constant
        # of a stream that begins at variance 1 and gains constant^2 with every branch
        self.deviations = [math.sqrt(1 + (2 * layer + branch) * self.constant**2) for branch in (0, 1)]
        depth = config.num_hidden_layers
        small = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
        self.initial = {"fixup": 1.0, "layerscale": small}.get(self.scheme, 0.0)
        size = config.hidden_size if self.scheme == "layerscale" else 1
        each = self.scheme in ("skipinit", "fixup", "layerscale", "nf")
        self.both = nn.Parameter(torch.full((1,), self.initial)) if self.scheme == "rezero" else None
        self.attn = nn.Parameter(torch.full((size,), self.initial)) if each else None
        self.mlp = nn.Parameter(torch.full((size,), self.initial)) if each else None

    def enter(self, x: Tensor, branch: int) -> Tensor:
        """What a branch reads of the stream."""
        return (wide(x) / self.deviations[branch]).to(x.dtype) if self.scheme == "nf" else x

    def join(self, x: Tensor, y: Tensor, branch: int) -> Tensor:
        """The stream x after the branch's output y."""
        if self.scheme == "plain":
            return x + y
        if self.scheme == "deepnorm":
            return (self.constant * wide(x) + wide(y)).to(x.dtype)
        scale = (self.attn, self.mlp)[branch] if self.both is None else self.both
        y = wide(y) if scale is None else scale * wide(y)
        return (wide(x) + self.constant * y).to(x.dtype)
