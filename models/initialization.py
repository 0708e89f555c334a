"""First values of every parameter, by role, the same tensor for tensor under any world size and engine.

torch's own initialization of a sharded tensor draws the same shard on every rank; here each parameter is drawn whole
from a generator of its own, seeded by (seed, parameter name), and a rank keeps its part.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.config import AlphaConfig, ModelConfig
from models.errors import ConfigError
from models.plan import ATTENTION_SITES
from models.roles import Role, parameter_roles

OUTPUT_PROJECTIONS = ("attention.out", "feedforward.down")

# arXiv 2503.10622v2, table 11: width -> alpha at (attention sites, other sites); depth made no difference.
PAPER_ALPHA = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 8192: (0.2, 0.05)}


def alpha_by_width(width: int) -> tuple[float, float]:
    """The paper's table, log-log interpolated between its rows and constant beyond its ends (the table says nothing
    there; below width 1024 the rule is known to fail, see docs/results.md). Returns (attention, other)."""
    widths = sorted(PAPER_ALPHA)
    width = min(max(width, widths[0]), widths[-1])
    low = max(w for w in widths if w <= width)
    high = min(w for w in widths if w >= width)
    if low == high:
        return PAPER_ALPHA[low]
    t = math.log(width / low) / math.log(high / low)
    attention, other = (a ** (1 - t) * b**t for a, b in zip(PAPER_ALPHA[low], PAPER_ALPHA[high], strict=True))
    return attention, other


def initial_alpha(site: str, width: int, config: AlphaConfig) -> float:
    """alpha at ``site`` before the first step. For rule measured, the value before the measurement: 1."""
    attention = site in ATTENTION_SITES
    if config.rule == "constant":
        return config.constant
    if config.rule == "role":
        return config.attention if attention else config.other
    if config.rule == "width":
        return alpha_by_width(width)[0 if attention else 1]
    return 1.0


def _std(name: str, role: Role, shape: torch.Size, config: ModelConfig) -> float:
    init = config.init
    if role == "embedding":
        return 0.02 if init.embedding_std is None else init.embedding_std
    if role == "head" and init.head_std is not None:
        return init.head_std
    std = shape[1] ** -0.5 if init.std == "fan_in" else float(init.std)
    if init.depth_scaled_output and name.rsplit(".", 1)[0].endswith(OUTPUT_PROJECTIONS):
        std /= math.sqrt(2 * config.depth)
    return std


def _first_value(name: str, role: Role, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    full = torch.empty(shape)
    if role in ("matrix", "embedding", "head"):
        # seed and name in 32 bits together: torch's CPU generator ignores all above them
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        std = _std(name, role, shape, config)
        if config.init.distribution == "trunc_normal":
            return nn.init.trunc_normal_(full, std=std, a=-2 * std, b=2 * std, generator=generator)
        return full.normal_(std=std, generator=generator)
    if role == "gain":
        return full.fill_(1.0)
    if role == "alpha":
        return full.fill_(initial_alpha(name.split(".")[-2], config.width, config.alpha))
    if role == "scale":
        return full.fill_(math.sqrt(config.width))
    return full.zero_()  # bias, shift


@torch.no_grad()
def assign(parameter: Tensor, full: Tensor) -> None:
    """Write ``full`` into ``parameter``; a sharded one takes its part, without communication."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device)
        # src_data_rank=None: every rank holds the same full tensor already
        part = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(full)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Give every parameter of a materialized model, sharded or not, its first value."""
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        assign(parameter, _first_value(name, roles[name], parameter.shape, config, seed))


@torch.no_grad()
def measure_alpha(model: nn.Module, forward: Callable[[], object], target: float) -> dict[str, float]:
    """Set every alpha to ``target`` / (standard deviation of its site's input), in one forward pass, and return them.

    Sites are set in the order in which ``forward`` reaches them, so that each is measured with those before it
    already in place. All ranks must run the same batch, so that they agree.
    """
    parameters = dict(model.named_parameters())  # the sharded ones; a forward can leave gathered copies in their place
    measured: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "alpha", None), nn.Parameter):

            def measure(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                std = inputs[0].float().std().item()
                if not (math.isfinite(std) and std > 0):
                    raise ConfigError(
                        f"model.alpha.rule measured: the input of {name} has standard deviation {std}; choose another "
                        "rule, or check model.init for weights that start at zero"
                    )
                measured[name] = target / std
                module.alpha.fill_(measured[name])  # type: ignore[operator]  # of this forward, if sharded

            handles.append(module.register_forward_pre_hook(measure))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    for name, alpha in measured.items():
        assign(parameters[f"{name}.alpha"], torch.full((1,), alpha))
    return measured
