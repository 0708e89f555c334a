"""How a branch joins the residual stream: with the stream x and a branch f, a line a scheme.

::

    plain       x + f(x), and no module at all
    rezero      x + a f(x), one learned number a block for both branches, initially 0 (arXiv 2003.04887 and its code)
    skipinit    x + a f(x), one learned number a branch, initially 0 (arXiv 2002.10444, there for ResNets)
    fixup       x + a f(x), one learned number a branch, initially 1 (arXiv 1901.09321)
    layerscale  x + a f(x), one learned number a feature, initially 0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 beyond
                (arXiv 2103.17239)
    scaled      x + c f(x), c = 1/sqrt(2 depth): the order of what arXiv 2405.19279 takes, 0.2 for 18 blocks
    nf          x + c a f(x / sqrt(1 + i c^2)) for branch i = 0, 1, ... of the model, c = 0.2, with SkipInit's a
                (arXiv 2101.08692, there for ResNets; for a Transformer inferred)
    deepnorm    c x + f(x), c = (2 depth)^(1/4), before a norm of the stream (arXiv 2203.00555, for a decoder alone)

nf divides by the standard deviation of a stream that begins at variance 1 and gains c^2 with every branch. Fixup's
shifts stand at sites and its first weights are a rule of initialization.py; the plan ``fixup`` brings all three.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from models import kernels
from models.config import ModelConfig
from models.elementwise import Elementwise
from models.errors import ConfigError
from models.norms import RMSNorm
from models.precision import wide
from models.roles import Role

LEARNED = ("rezero", "skipinit", "fixup", "layerscale", "nf")
CONSTANT = ("scaled", "nf", "deepnorm")


def initial_scale(scheme: str, config: ModelConfig) -> float:
    """The first value of the learned numbers of ``scheme``."""
    if config.residual.initial is not None:
        return config.residual.initial
    if scheme == "layerscale":
        return 0.1 if config.depth <= 18 else 1e-5 if config.depth <= 24 else 1e-6
    return 1.0 if scheme == "fixup" else 0.0


def _constant(scheme: str, config: ModelConfig) -> float:
    if config.residual.constant is not None:
        return config.residual.constant
    defaults = {"scaled": (2 * config.depth) ** -0.5, "nf": 0.2, "deepnorm": (2 * config.depth) ** 0.25}
    return defaults.get(scheme, 1.0)


class Residual(nn.Module):
    """Both joints of block ``index``: branch 0 is attention, branch 1 the feed-forward."""

    roles: ClassVar[dict[str, Role]] = {"both": "scale", "attn": "scale", "mlp": "scale"}

    def __init__(self, scheme: str, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.scheme = scheme
        self.constant = _constant(scheme, config)
        # nf's own: what branch 2 index and the next read is divided by. Two floats, and not a pair of them, since for a
        # float torch.compile makes one version that serves all blocks.
        self.attn_divisor = math.sqrt(1 + 2 * index * self.constant**2)
        self.mlp_divisor = math.sqrt(1 + (2 * index + 1) * self.constant**2)
        size = config.width if scheme == "layerscale" else 1
        self.both = nn.Parameter(torch.ones(1)) if scheme == "rezero" else None
        each = scheme in LEARNED and scheme != "rezero"
        self.attn = nn.Parameter(torch.ones(size)) if each else None
        self.mlp = nn.Parameter(torch.ones(size)) if each else None

    def enter(self, x: Tensor, branch: int) -> Tensor:
        """What a branch reads of the stream."""
        if self.scheme != "nf":
            return x
        return (wide(x) / (self.mlp_divisor if branch else self.attn_divisor)).to(x.dtype)

    def forward(self, x: Tensor, y: Tensor, branch: int) -> Tensor:
        """The stream x after the branch's output y, in the dtype of x; the arithmetic is fp32."""
        if self.scheme == "deepnorm":
            return torch.add(wide(y), wide(x), alpha=self.constant).to(x.dtype)
        scale = (self.attn, self.mlp)[branch] if self.both is None else self.both
        return torch.add(wide(x), wide(y) if scale is None else scale * wide(y), alpha=self.constant).to(x.dtype)


def build_residual(scheme: str, config: ModelConfig, index: int) -> Residual | None:
    """None for plain. ConfigError where a setting has nothing to act on."""
    for key, schemes in (("initial", LEARNED), ("constant", CONSTANT)):
        value = getattr(config.residual, key)
        if value is not None and scheme not in schemes:
            raise ConfigError(
                f"model.residual.{key} is {value}, and scheme {scheme} has none: write null, or one of the schemes "
                + ", ".join(schemes)
            )
    if config.residual.constant is not None and not (0 < config.residual.constant < math.inf):
        raise ConfigError(f"model.residual.constant is {config.residual.constant}: write a positive number")
    return None if scheme == "plain" else Residual(scheme, config, index)


def join_fused(x: Tensor, y: Tensor, out: nn.Module | None, into: nn.Module | None) -> tuple[Tensor, Tensor]:
    """The plain stream ``s = x + out(y)`` and ``into(s)``, what the next branch reads, in as few passes over them as
    models/kernels has.

    The end of a block is the end of a pass: were the next block's norm drawn in, a block would have two inputs, and
    activation checkpointing twice as much to keep. A norm with hooks is called by itself.
    """
    before = out if isinstance(out, RMSNorm) and not kernels.is_watched(out) else None
    if before is None and out is not None:
        y = out(y)
    if into is not None and not kernels.is_watched(into):
        if isinstance(into, RMSNorm) and before is not None:
            return kernels.rms_norm_add_rms_norm(x, y, before.weight, before.eps, into.weight, into.eps)
        if isinstance(into, RMSNorm):
            return kernels.add_rms_norm(x, y, into.weight, into.eps)
        if isinstance(into, Elementwise) and into.kernel is not None and before is None:
            return into.add(x, y)
    s = x + y if before is None else kernels.rms_norm_add(x, y, before.weight, before.eps)
    return s, s if into is None else into(s)
