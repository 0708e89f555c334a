"""What DyT's sites see: alpha beside the standard deviation of a site's input, and the share of it that saturates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.elementwise import Elementwise
from models.precision import wide

SATURATED = 0.95  # of the way from the middle of a function's range to a bound of it
_FAR = 1e6  # where a bounded function has arrived at its bounds


class Site(NamedTuple):
    """One site at one forward pass, on the device, fp32: alpha (1,) and 1/std of its whole input (0-d).

    Alpha follows 1/std in the DyT paper's trained models (arXiv 2503.10622, section 7).
    """

    alpha: Tensor
    inverse_std: Tensor


@contextmanager
def hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Hooks for the forward passes inside the ``with``: afterwards the model carries none, so ordinary steps pay
    nothing. Compiled blocks run eagerly, since a compiled graph does not see hooks that come after it."""
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_sites(model: nn.Module) -> Iterator[dict[str, Site]]:
    """Record every module that owns an ``alpha`` parameter during the forward pass inside the ``with``.

    Yields a dict, name of the module -> Site, that the pass fills; of several passes the last stays. Nothing is
    read back to the host. Under FSDP the hook runs while parameters are gathered, so alpha is whole, and the input is
    this rank's micro-batch.
    """
    sites: dict[str, Site] = {}
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if "alpha" in dict(module.named_parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(_recorder(name, sites)))
    with hooked(handles):
        yield sites


def scalars(sites: dict[str, Site]) -> dict[str, float]:
    """``alpha/NAME`` and ``inverse_std/NAME`` as numbers, in one transfer from the device."""
    return numbers({f"{kind}/{name}": value for name, site in sites.items() for kind, value in site._asdict().items()})


def numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Tensors of one element each, of one device, as numbers, in one transfer."""
    if not tensors:
        return {}
    values = torch.cat([tensor.double().reshape(1) for tensor in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))


def _recorder(name: str, sites: dict[str, Site]) -> Any:
    @torch.no_grad()
    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        std = inputs[0].float().std(correction=0)
        alpha = module.get_parameter("alpha").float().clone()  # FSDP frees the gathered one after the pass
        sites[name] = Site(alpha, std.reciprocal())

    return record


@contextmanager
def record_saturation(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record at every bounded elementwise function the share of its values, before gain and beta, that lie beyond
    ``SATURATED`` of its range: for DyT those with ``|tanh(z)| > 0.95``, where less than a tenth of a gradient passes.

    Yields a dict, name of the module -> fp32 [], as ``record_sites`` does.
    """
    found: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, Elementwise) and module.bounded:
            handles.append(module.register_forward_pre_hook(_saturation(name, _bounds(module), found)))
    with hooked(handles):
        yield found


def _bounds(module: Elementwise) -> tuple[float, float]:
    """Between what the function stays."""
    low, high = module.f(torch.tensor([-_FAR, _FAR], dtype=torch.float64)).tolist()
    return low, high


def _saturation(name: str, bounds: tuple[float, float], found: dict[str, Tensor]) -> Any:
    middle, reach = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2

    @torch.no_grad()
    def record(module: Elementwise, inputs: tuple[Tensor, ...]) -> None:
        z = module.alpha * wide(inputs[0])
        y = module.f(z if module.shift is None else z + module.shift)
        found[name] = ((y - middle).abs() > SATURATED * reach).float().mean()

    return record
