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

from models.alpha import initial_alpha
from models.config import ModelConfig
from models.errors import ConfigError
from models.plan import resolve_plan
from models.residual import initial_scale
from models.roles import Role, parameter_roles

_PORTION = 2**22  # elements, 16 MiB

OUTPUT_PROJECTIONS = ("attention.out", "feedforward.down")
SCALED_PROJECTIONS = ("attention.v", "feedforward.up", *OUTPUT_PROJECTIONS)


def weight_std(name: str, role: Role, shape: tuple[int, ...], config: ModelConfig) -> float:
    """Of a matrix, an embedding or a head; 0 for one that starts at zero.

    ``torch`` is what nn.Linear does, 1/sqrt(3 * inputs). The rules of papers multiply Xavier's std, sqrt(2 / (rows +
    columns)), in a model of depth L::

        fixup      query, key, value (2L)^(-1/6), as one matrix; up (2L)^(-1/2); outputs of branches and head 0
        t-fixup    value, up and outputs of branches 0.67 L^(-1/4); query and key 1/sqrt(2), fairseq's own gain
        deepnorm   value, up and outputs of branches (8L)^(-1/4)
        magneto    value, up and outputs of branches sqrt(log(2L))

    (arXiv 1901.09321 and its code for fairseq; Huang et al., ICML 2020, and its code; 2203.00555; 2210.06423.)
    For a decoder alone Fixup's 2L branches and T-Fixup's factor, there an encoder's, are inferred. The papers'
    feed-forward has no gate: here a gate starts at Xavier's std alone, as in torchscale's code. All but magneto want
    embeddings of 1/sqrt(width), in T-Fixup times (9L)^(-1/4), behind a multiplication by sqrt(width), which their plans
    have as the embedding scale. Fixup, T-Fixup and torch draw from a uniform distribution, ``model.init.distribution
    uniform``. A tied head starts as the embedding; for Fixup that is a deviation.
    """
    init, rule = config.init, resolve_plan(config).init
    layer = ".".join(name.split(".")[-3:-1])  # attention.q, feedforward.down
    if role == "embedding":
        if init.embedding_std is not None:
            return init.embedding_std
        if rule in ("standard", "magneto"):
            return 0.02
        return config.width**-0.5 * ((9 * config.depth) ** -0.25 if rule == "t-fixup" else 1.0)
    if role == "head":
        if init.head_std is not None:
            return init.head_std
        if rule in ("fixup", "t-fixup", "deepnorm"):
            return 0.0 if rule == "fixup" else config.width**-0.5
    if rule == "torch":
        return (3 * shape[1]) ** -0.5
    if rule == "standard" or role == "head":
        std = shape[1] ** -0.5 if init.std == "fan_in" else float(init.std)
        return std / math.sqrt(2 * config.depth) if init.depth_scaled_output and layer in OUTPUT_PROJECTIONS else std
    return _xavier_factor(rule, layer, config.depth) * math.sqrt(2 / (_rows(rule, layer, shape, config) + shape[1]))


def _xavier_factor(rule: str, layer: str, depth: int) -> float:
    if rule == "fixup":
        if layer in OUTPUT_PROJECTIONS:
            return 0.0
        return {"feedforward.up": (2 * depth) ** -0.5, "feedforward.gate": 1.0}.get(layer, (2 * depth) ** (-1 / 6))
    if layer in SCALED_PROJECTIONS:
        factors = {"t-fixup": 0.67 * depth**-0.25, "deepnorm": (8 * depth) ** -0.25}
        return factors.get(rule, math.sqrt(math.log(2 * depth)))
    return 2**-0.5 if rule == "t-fixup" and layer in ("attention.q", "attention.k") else 1.0


def _rows(rule: str, layer: str, shape: tuple[int, ...], config: ModelConfig) -> int:
    """Fixup's code has query, key and value in one matrix."""
    if rule == "fixup" and layer.startswith("attention"):
        return (config.heads + 2 * config.key_value_heads) * config.head_width
    return shape[0]


def first_rows(name: str, role: Role, shape: torch.Size, rows: range, config: ModelConfig, seed: int) -> Tensor:
    """Rows (indices of the first axis) of the first value of the parameter ``name`` of ``shape``, fp32 on the CPU.

    Random ones are drawn in portions of about ``_PORTION`` elements, each from a generator of its own, so that a
    rank pays for its own rows, and nobody ever holds a large parameter whole.
    """
    part = torch.empty(len(rows), *shape[1:])
    if role in ("matrix", "embedding", "head"):
        _draw(part, name, shape, rows, weight_std(name, role, shape, config), config.init.distribution, seed)
    elif role == "gain":
        part.fill_(1.0)
    elif role == "alpha":
        part.fill_(initial_alpha(name.split(".")[-2], config.width, config.alpha))
    elif role == "scale":
        of_stream = name.split(".")[-2:-1] == ["residual"]
        part.fill_(initial_scale(resolve_plan(config).residual, config) if of_stream else math.sqrt(config.width))
    else:  # bias, shift
        part.zero_()
    return part


def _draw(part: Tensor, name: str, shape: torch.Size, rows: range, std: float, distribution: str, seed: int) -> None:
    if std == 0:
        part.zero_()
        return
    portion = max(1, _PORTION // math.prod(shape[1:]))
    for begin in range(rows.start // portion * portion, rows.stop, portion):
        # seed and name in 32 bits together: torch's CPU generator ignores all above them
        key = f"{seed} {name}" if begin == 0 else f"{seed} {name} {begin}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        drawn = torch.empty(min(portion, shape[0] - begin), *shape[1:])
        if distribution == "trunc_normal":
            nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
        elif distribution == "uniform":
            drawn.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)
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
