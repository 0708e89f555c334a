"""How many elements the model has, and how many of them one rank of a group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from models import ModelConfig, Role, Transformer, parameter_roles
from models.plan import resolve_plan
from pretrain.engines.fsdp import REPLICATED_ROLES


@dataclass(frozen=True)
class Part:
    """A block, or the root: embedding, positions, head and what stands outside the blocks. In elements.

    ``whole`` is what ranks share, ``share`` the first rank's rows of it, padded as FSDP pads; ``replicated`` are gains,
    alphas and the like.
    """

    whole: int
    share: int
    replicated: int
    linears: int  # of whole: weights of linears whose rows divide by the ranks, which fp8 may gather in 8 bits

    @property
    def elements(self) -> int:
        return self.whole + self.replicated


@dataclass(frozen=True)
class Sizes:
    """Of the whole model, in elements. ``first`` of its blocks have sites of their own, and at each of them
    ``first_excess`` elements more, or less, than ``block``."""

    depth: int
    block: Part
    root: Part
    head: int  # elements of an untied head's weight
    matmul: int  # parameters in matrix products, a tied head's among them (telemetry/flops.py)
    first: int = 0
    first_excess: int = 0

    @property
    def parameters(self) -> int:
        return self.depth * self.block.elements + self.first * self.first_excess + self.root.elements

    @property
    def share(self) -> int:
        return self.depth * self.block.share + self.root.share

    @property
    def replicated(self) -> int:
        return self.depth * self.block.replicated + self.first * self.first_excess + self.root.replicated


def measure(config: ModelConfig, ranks: int) -> Sizes:
    """Sizes of the model whose ``ranks`` share each parameter's rows."""
    first = resolve_plan(config).first_count(config.depth)
    with torch.device("meta"):  # the first blocks differ in what stands at their sites, which is replicated
        model = Transformer(replace(config, depth=2, first_blocks=1) if first else replace(config, depth=1))
    roles = parameter_roles(model)
    parameters = dict(model.named_parameters())
    block = {name: p for name, p in parameters.items() if name.startswith(f"blocks.{len(model.blocks) - 1}.")}
    root = {name: p for name, p in parameters.items() if not name.startswith("blocks.")}
    excess = sum(p.numel() for p in model.blocks[0].parameters()) - sum(p.numel() for p in block.values())
    linears = sum(p.numel() for name, p in block.items() if roles[name] == "matrix")
    divisible = sum(p.numel() for name, p in block.items() if roles[name] == "matrix" and p.shape[0] % ranks == 0)
    logits = config.vocabulary * config.width
    return Sizes(
        depth=config.depth,
        block=_part(block, roles, ranks, divisible),
        root=_part(root, roles, ranks, 0),
        head=0 if config.is_tied else logits,
        matmul=config.depth * linears + logits,
        first=first,
        first_excess=excess,
    )


def _part(parameters: Mapping[str, nn.Parameter], roles: Mapping[str, Role], ranks: int, linears: int) -> Part:
    shared = [p.shape for name, p in parameters.items() if roles[name] not in REPLICATED_ROLES]
    return Part(
        whole=sum(math.prod(shape) for shape in shared),
        share=sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in shared),
        replicated=sum(p.numel() for name, p in parameters.items() if roles[name] in REPLICATED_ROLES),
        linears=linears,
    )
