"""Modules that compute through the kernels."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


def fuse(model: nn.Module) -> None:
    """From here on the model's modules compute through ``models.kernels``, where these have what they compute.

    Each of them decides in its own forward: ``fused`` is an attribute of the classes that can. Parameters, their names
    and the functions stay as they are, up to where bf16 is rounded.
    """
    for module in model.modules():
        if hasattr(type(module), "fused"):
            cast(Any, module).fused = True


def is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks, for which it has to be called by itself with its own input and output: those of
    telemetry for a pass, those of ZeRO-3, which gather its parameters, always."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
