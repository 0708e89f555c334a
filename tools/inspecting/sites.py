"""What each normalization site does to the text: its input, its output, and the DyT that comes nearest to it."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn

from models.elementwise import Elementwise
from models.norms import NORMS
from models.precision import wide
from pretrain.telemetry.sites import hooked, record_saturation
from pretrain.telemetry.statistics import moments
from tools.inspecting.subject import Subject, chunks, forward

_FITTED = 2**14  # elements that a fit is made to
_EXTREME = 2**6  # the largest of all, beside them, for the pictures
_RANGE = (1e-2, 1e2)  # alpha times the input's standard deviation: below, tanh is a line; above, a step


class Fit(NamedTuple):
    """``scale * tanh(alpha * x)`` by least squares, beside the best line through 0. Without a bend in the data every
    small alpha fits alike, and alpha and scale are NaN."""

    alpha: float
    scale: float
    r2: float  # share of the output's variance that it explains
    line_r2: float


class SiteLook(NamedTuple):
    """One site over the held-out text.

    ``x`` and ``y`` are elements drawn at random: of the input, and of the output less shift and divided by gain, fp32
    [elements] on the CPU. ``extreme_x`` and ``extreme_y`` are those of the largest inputs.
    """

    name: str
    site: str
    block: int | None
    function: str
    std: float  # of all elements of the input
    alpha: float | None  # of an elementwise function
    saturated: float | None  # share of elements, where a bounded function saturates
    fit: Fit | None  # of a normalization
    x: Tensor
    y: Tensor
    extreme_x: Tensor
    extreme_y: Tensor
    curve: Tensor | None  # [2, points]: an elementwise function without gain and beta, over the range of its inputs


def look_at_sites(subject: Subject, progress: Progress) -> list[SiteLook]:
    """All sites of the model that have a function, in the model's order."""
    kinds = tuple(NORMS.values())
    sites: dict[str, nn.Module] = {
        name: module for name, module in subject.model.named_modules() if isinstance(module, kinds)
    }
    seen = {name: _Seen(module) for name, module in sites.items()}
    shares: dict[str, list[Tensor]] = defaultdict(list)
    rows: list[int] = []
    for part in progress.track(list(chunks(subject.held_out)), description="sites"):
        handles = [sites[name].register_forward_hook(one.watch) for name, one in seen.items()]
        with hooked(handles), record_saturation(subject.model) as saturation:
            forward(subject, part)
        rows.append(len(part.inputs))
        for name, share in saturation.items():
            shares[name].append(share)
    weight = torch.tensor(rows) / sum(rows)
    found = []
    for name, one in progress.track(list(seen.items()), description="fits"):
        saturated = (torch.stack(shares[name]).cpu() @ weight).item() if name in shares else None
        found.append(one.look(name, saturated))
    return found


def fit_dyt(x: Tensor, y: Tensor) -> Fit:
    """The DyT nearest to outputs ``y`` of inputs ``x``, [elements] each. For a given alpha the scale is linear least
    squares; log alpha is the best of a grid, made finer by Brent's method."""
    from scipy.optimize import minimize_scalar

    x, y = x.double(), y.double()
    variance = (y - y.mean()).square().sum().item()
    std = x.std(correction=0).item()
    if not (std > 0 and variance > 0):
        return Fit(*[math.nan] * 4)

    def explained(shape: Tensor) -> float:
        return 1 - (y - _scale(shape, y) * shape).square().sum().item() / variance

    def error(log_alpha: float) -> float:
        return -explained(torch.tanh(math.exp(log_alpha) * x))

    line = explained(x)
    low, high = (math.log(edge / std) for edge in _RANGE)
    grid = torch.linspace(low, high, 33).tolist()
    best = min(range(len(grid)), key=lambda place: error(grid[place]))
    if best == 0:
        return Fit(math.nan, math.nan, line, line)
    bounds = (grid[best - 1], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    alpha = math.exp(found.x)
    return Fit(alpha, _scale(torch.tanh(alpha * x), y), -found.fun, line)


def _scale(shape: Tensor, y: Tensor) -> float:
    return ((shape @ y) / (shape @ shape)).item()


class _Seen:
    """What one module's passes leave behind."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.moments: Tensor | None = None
        self.drawn: list[Tensor] = []  # [2, elements]: inputs and outputs
        self.extreme = torch.empty(2, 0)
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = wide(inputs[0]), wide(output)
        sums = moments(x)
        self.moments = sums if self.moments is None else self.moments + sums
        parameters = dict(module.named_parameters(recurse=False))
        if "bias" in parameters:
            y = y - parameters["bias"]
        if "weight" in parameters:
            y = y / parameters["weight"]  # a gain of 0 hides what it multiplies: not finite, and left out below
        flat_x, flat_y = x.reshape(-1), y.reshape(-1)
        place = torch.randint(flat_x.numel(), (_FITTED,), generator=self.generator).to(x.device)
        self.drawn.append(_finite(flat_x[place], flat_y[place]))
        largest = flat_x.abs().topk(min(_EXTREME, flat_x.numel())).indices
        pairs = torch.cat([self.extreme, _finite(flat_x[largest], flat_y[largest])], dim=1)
        self.extreme = pairs[:, pairs[0].abs().topk(min(_EXTREME, pairs.shape[1])).indices]

    def look(self, name: str, saturated: float | None) -> SiteLook:
        assert self.moments is not None, f"{name} stands in the model and was not called"
        count, total, squares = self.moments[:3].tolist()
        drawn = torch.cat(self.drawn, dim=1)
        x, y = drawn[:, torch.randperm(drawn.shape[1], generator=self.generator)[:_FITTED]]
        module = self.module
        alpha = float(torch.as_tensor(module.alpha).detach()) if isinstance(module, Elementwise) else None
        parts = name.split(".")
        return SiteLook(
            name,
            parts[-1],
            int(parts[1]) if parts[0] == "blocks" else None,
            next(function for function, kind in NORMS.items() if type(module) is kind),
            math.sqrt(max(0.0, squares / count - (total / count) ** 2)),
            alpha,
            saturated,
            fit_dyt(x, y) if alpha is None else None,
            x,
            y,
            self.extreme[0],
            self.extreme[1],
            _curve(module, self.extreme[0]) if isinstance(module, Elementwise) else None,
        )


@torch.no_grad()
def _curve(module: Elementwise, extreme: Tensor) -> Tensor:
    reach = extreme.abs().max().item()
    x = torch.linspace(-reach, reach, 300)
    z = torch.as_tensor(module.alpha).cpu() * x
    return torch.stack([x, module.f(z if module.shift is None else z + module.shift.cpu())])


def _finite(x: Tensor, y: Tensor) -> Tensor:
    pairs = torch.stack([x, y]).cpu()
    return pairs[:, pairs.isfinite().all(0)]


def facts(look: SiteLook) -> dict[str, Any]:
    """What other programs may want of it."""
    keys = ("name", "site", "block", "function", "std", "alpha", "saturated")
    return {key: getattr(look, key) for key in keys} | {"fit": look.fit and look.fit._asdict()}


def bent(look: SiteLook) -> float:
    """The alpha of an elementwise function, or of the DyT nearest to a norm; NaN where there is none."""
    if look.alpha is not None:
        return look.alpha
    return math.nan if look.fit is None else look.fit.alpha
