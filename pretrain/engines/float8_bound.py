"""8-bit inputs whose scale is known before the data is.

DyT and its like never exceed ``|gain| + |beta|``, feature by feature. The greatest of these sums takes the place of the
largest magnitude of the data in the scale of what they write: no pass over the activations looks for it, and they are
rounded once for all linears that read them, not once for each. Fused, DyT and Derf write 8 bits themselves; a hook
before the readers rounds what other functions write, and all of them unfused or watched.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from models.elementwise import Elementwise
from models.errors import ConfigError

# Of a block: a site, where its values enter, and the linears that read them there.
_ENTRIES = (
    ("attn_in", "attention", ("attention.q", "attention.k", "attention.v")),
    ("attention.attn_mid", "attention.out", ("attention.out",)),
    ("mlp_in", "feedforward", ("feedforward.gate", "feedforward.up")),
    ("feedforward.mlp_mid", "feedforward.down", ("feedforward.down",)),
)


def largest_output(norm: Elementwise, device: torch.device) -> Tensor:
    """What ``norm`` never exceeds in magnitude, fp32 []: the largest ``|gain| + |beta|`` of its features."""
    bound = torch.ones(1, device=device) if norm.weight is None else norm.weight.abs()
    return (bound if norm.bias is None else bound + norm.bias.abs()).amax()


def bound_inputs(model: nn.Module, converted: list[str]) -> list[str]:
    """Round what bounded functions write with the scale of their bound, where all that read it are ``converted``
    (tensorwise) linears. Returns those linears' names; ConfigError where there are none."""
    found: list[str] = []
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    for index, block in enumerate(blocks):
        modules = dict(block.named_modules())
        for site, entry, readers in _ENTRIES:
            norm = modules.get(site)
            names = [f"blocks.{index}.{reader}" for reader in readers if reader in modules]
            if isinstance(norm, Elementwise) and norm.bounded and set(names) <= set(converted):
                first = model.get_submodule(names[0])
                norm.write, rounded = _rounding(norm, first)
                modules[entry].register_forward_pre_hook(rounded)
                found += names
    if not found:
        raise ConfigError(
            "precision.fp8_input_scale bound: no bounded function (DyT and its like) writes what 8-bit linears alone "
            "read; write --precision.fp8_input_scale dynamic, or another model.plan, or fewer precision.fp8_skip"
        )
    return found


def _rounding(norm: Elementwise, linear: nn.Module) -> tuple[Any, Any]:
    """What writes the output of ``norm`` as ``linear`` reads it, and a hook before ``linear`` for where it did not."""
    from torchao.float8.float8_training_tensor import (
        Float8TrainingTensor,
        GemmInputRole,
        hp_tensor_and_scale_to_float8,
    )
    from torchao.float8.float8_utils import amax_to_scale

    from pretrain.engines.float8_dyt import Float8DyT

    settings, products = cast(Any, linear).config, cast(Any, linear).linear_mm_config
    dtype = settings.cast_config_input.target_dtype

    def scale_on(device: torch.device) -> Tensor:
        with torch.no_grad():
            return amax_to_scale(largest_output(norm, device), dtype, settings.round_scales_to_power_of_2)

    def write(x: Tensor, branch: Tensor | None = None) -> Any:
        return Float8DyT.apply(x, branch, scale_on(x.device), *norm.settings(), products)

    def rounded(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        if not isinstance(x, Float8TrainingTensor):
            x = hp_tensor_and_scale_to_float8(x, scale_on(x.device), dtype, products, GemmInputRole.INPUT)
        return x, *others

    return write, rounded
