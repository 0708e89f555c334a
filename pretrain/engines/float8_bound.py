"""8-bit inputs whose scale is known before the data is.

DyT and its like never exceed ``|gain| + |beta|``, feature by feature. The greatest of these sums takes the place of the
largest magnitude of the data in the scale of what they write: no pass over the activations looks for it, and they are
rounded once for all linears that read them, not once for each.
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
                modules[entry].register_forward_pre_hook(_rounding(norm, first))
                found += names
    if not found:
        raise ConfigError(
            "precision.fp8_input_scale bound: no bounded function (DyT and its like) writes what 8-bit linears alone "
            "read; write --precision.fp8_input_scale dynamic, or another model.plan, or fewer precision.fp8_skip"
        )
    return found


def _rounding(norm: Elementwise, linear: nn.Module) -> Any:
    from torchao.float8.float8_training_tensor import GemmInputRole, hp_tensor_and_scale_to_float8
    from torchao.float8.float8_utils import amax_to_scale

    settings, products = cast(Any, linear).config, cast(Any, linear).linear_mm_config
    dtype = settings.cast_config_input.target_dtype

    def rounded(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        with torch.no_grad():
            scale = amax_to_scale(largest_output(norm, x.device), dtype, settings.round_scales_to_power_of_2)
        return hp_tensor_and_scale_to_float8(x, scale, dtype, products, GemmInputRole.INPUT), *others

    return rounded
