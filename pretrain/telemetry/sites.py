"""What DyT's alphas see: at each site, alpha and the standard deviation of the site's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Site(NamedTuple):
    """One site at one forward pass, on the device, fp32: alpha (1,) and 1/std of its whole input (0-d).

    Alpha follows 1/std in the DyT paper's trained models (arXiv 2503.10622, section 7).
    """

    alpha: Tensor
    inverse_std: Tensor


@contextmanager
def record_sites(model: nn.Module) -> Iterator[dict[str, Site]]:
    """Record every module that owns an ``alpha`` parameter during the forward pass inside the ``with``.

    Yields a dict, name of the module -> Site, that the pass fills; of several passes the last stays. Nothing is
    read back to the host. Outside the context the model carries no hook, so ordinary steps pay nothing; inside it
    compiled blocks run eagerly, since a compiled graph does not see hooks that come after it. Under FSDP the hook
    runs while parameters are gathered, so alpha is whole, and the input is this rank's micro-batch.
    """
    sites: dict[str, Site] = {}
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if "alpha" in dict(module.named_parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(_recorder(name, sites)))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield sites
    finally:
        for handle in handles:
            handle.remove()


def scalars(sites: dict[str, Site]) -> dict[str, float]:
    """``alpha/NAME`` and ``inverse_std/NAME`` as numbers, in one transfer from the device."""
    if not sites:
        return {}
    keys = [f"{kind}/{name}" for name in sites for kind in Site._fields]
    values = torch.cat([tensor.reshape(1) for site in sites.values() for tensor in site]).tolist()
    return dict(zip(keys, values, strict=True))


def _recorder(name: str, sites: dict[str, Site]) -> Any:
    @torch.no_grad()
    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        std = inputs[0].float().std(correction=0)
        alpha = module.get_parameter("alpha").float().clone()  # FSDP frees the gathered one after the pass
        sites[name] = Site(alpha, std.reciprocal())

    return record
