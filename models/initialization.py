"""First values of every parameter, by role, the same tensor for tensor under any world size and engine.

torch's own initialization of a sharded tensor draws the same shard on every rank; here each parameter is drawn from
generators of its own, seeded by (seed, parameter name, place in the parameter), and a rank draws its part.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from models.config import AlphaConfig, ModelConfig
from models.errors import ConfigError
from models.plan import ATTENTION_SITES
from models.roles import Role, parameter_roles

_PORTION = 2**22  # elements, 16 MiB

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


def first_rows(name: str, role: Role, shape: torch.Size, rows: range, config: ModelConfig, seed: int) -> Tensor:
    """Rows (indices of the first axis) of the first value of the parameter ``name`` of ``shape``, fp32 on the CPU.

    Random ones are drawn in portions of about ``_PORTION`` elements, each from a generator of its own, so that a
    rank pays for its own rows, and nobody ever holds a large parameter whole.
    """
    part = torch.empty(len(rows), *shape[1:])
    if role in ("matrix", "embedding", "head"):
        _draw(part, name, shape, rows, _std(name, role, shape, config), config.init.distribution, seed)
    elif role == "gain":
        part.fill_(1.0)
    elif role == "alpha":
        part.fill_(initial_alpha(name.split(".")[-2], config.width, config.alpha))
    elif role == "scale":
        part.fill_(math.sqrt(config.width))
    else:  # bias, shift
        part.zero_()
    return part


def _draw(part: Tensor, name: str, shape: torch.Size, rows: range, std: float, distribution: str, seed: int) -> None:
    portion = max(1, _PORTION // math.prod(shape[1:]))
    for begin in range(rows.start // portion * portion, rows.stop, portion):
        # seed and name in 32 bits together: torch's CPU generator ignores all above them
        key = f"{seed} {name}" if begin == 0 else f"{seed} {name} {begin}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        drawn = torch.empty(min(portion, shape[0] - begin), *shape[1:])
        if distribution == "trunc_normal":
            nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
        else:
            drawn.normal_(std=std, generator=generator)
        first, last = max(rows.start, begin), min(rows.stop, begin + len(drawn))
        part[first - rows.start : last - rows.start] = drawn[first - begin : last - begin]


def own_rows(parameter: Tensor) -> range:
    """The rows that this process holds: all of a plain tensor, its chunk of a DTensor sharded along the first axis."""
    count = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return range(count)
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "this process is in the mesh"
    rows = range(count)
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Replicate):
            continue
        assert placement == Shard(0), "sharded along the first axis"
        rows = chunk_of(rows, coordinate[dimension], parameter.device_mesh.size(dimension))
    return rows


def chunk_of(rows: range, index: int, count: int) -> range:
    """The chunk with this index of ``count``, as torch.chunk and DTensor cut: the last ones may be short or empty."""
    size = -(-len(rows) // count)
    return rows[index * size :][:size]


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Give every parameter of a materialized model, sharded or not, its first value, without communication."""
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        part = first_rows(name, roles[name], parameter.shape, own_rows(parameter), config, seed)
        _write_own(parameter, part)


def _write_own(parameter: Tensor, part: Tensor) -> None:
    (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(part)


@torch.no_grad()
def measure_alpha(model: nn.Module, forward: Callable[[], object], target: float) -> dict[str, float]:
    """Set every alpha to ``target`` / (standard deviation of its site's input), in one forward pass, and return them
    by site.

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
                module.alpha.fill_(target / std)  # type: ignore[operator]

            handles.append(module.register_forward_pre_hook(measure))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    for name, alpha in measured.items():
        parameter = parameters[f"{name}.alpha"]
        _write_own(parameter, torch.full((len(own_rows(parameter)),), alpha))
    return measured
