"""Blocks whose matrix products run in 8 bits, through torchao (kept by PyTorch; three recipes behind one switch).

Weights stay in fp32 and each product quantizes its operands anew ("dynamic"), in the backward too (arXiv 2209.05433;
for mxfp8 OCP's Microscaling Formats 1.0). Where the device has no such products they are emulated: operands are
rounded to 8 bits and multiplied in the compute type, which costs time and shows the loss of precision. Embedding and
head are not linears of a block and keep the compute type.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.errors import ConfigError
from pretrain.config import PrecisionConfig

_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0), "mxfp8": (10, 0)}
_GPUS = {
    "tensorwise": "Ada, Hopper or Blackwell (L4, L40S, RTX 4090, H100, B200)",
    "rowwise": "Hopper or Blackwell (H100, H200, B200)",
    "mxfp8": "Blackwell (B200, GB200)",
}
_MULTIPLE = {"tensorwise": 16, "rowwise": 16, "mxfp8": 32}  # of both sizes of a weight: scaled products' alignment


def chosen_linears(model: nn.Module, precision: PrecisionConfig) -> list[str]:
    """Names of the blocks' linears that run in 8 bits, in the model's order."""
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    names = [f"blocks.{name}" for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    first, last = precision.fp8_skip_first, len(blocks) - precision.fp8_skip_last
    for key, count in (("first", precision.fp8_skip_first), ("last", precision.fp8_skip_last)):
        if count < 0:
            raise ConfigError(f"precision.fp8_skip_{key} is {count}: write 0 or more blocks")
    for part in precision.fp8_skip:
        if not any(part in name for name in names):
            raise ConfigError(f"precision.fp8_skip: no linear's name contains {part!r}; a name is {names[0]}")
    chosen = [
        name
        for name in names
        if first <= int(name.split(".")[1]) < last and not any(part in name for part in precision.fp8_skip)
    ]
    if not chosen:
        raise ConfigError(f"precision.fp8 {precision.fp8}: the skips leave no linear; write --precision.fp8 none")
    return chosen


def convert_linears(model: nn.Module, precision: PrecisionConfig, device: torch.device, group: int) -> list[str]:
    """Exchange the chosen linears of ``model`` (on any device, meta too) for 8-bit ones and return their names.

    ``group``: FSDP gathers weights with tensorwise scales in 8 bits from so many ranks; 0 for none. ConfigError where
    torchao, the GPU or the sizes do not allow it.
    """
    if precision.fp8 == "none":
        return []
    _require(precision.fp8, device)
    names = chosen_linears(model, precision)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        multiple = _MULTIPLE[precision.fp8]
        if linear.in_features % multiple or linear.out_features % multiple:
            raise ConfigError(
                f"precision.fp8 {precision.fp8} takes sizes that are multiples of {multiple}; {name} is "
                f"{linear.out_features} x {linear.in_features}: change model.width or model.ffn_width, or name it in "
                "precision.fp8_skip"
            )
        parent, _, leaf = name.rpartition(".")
        # torchao's weights know no padding: where rows do not divide, they are gathered as the others are.
        gather = precision.fp8 == "tensorwise" and group > 0 and linear.out_features % group == 0
        setattr(model.get_submodule(parent), leaf, _converted(linear, precision.fp8, device.type == "cpu", gather))
    return names


def _require(recipe: str, device: torch.device) -> None:
    for noisy in ("torchao", "torch.utils._pytree"):  # of CUDA libraries that are not here, of its own enums
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchao.float8")
    except ImportError:
        raise ConfigError(
            f"precision.fp8 {recipe} needs torchao, which is not here: pip install torchao, or write "
            "--precision.fp8 none"
        ) from None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY[recipe]:
        raise ConfigError(
            f"precision.fp8 {recipe} needs an NVIDIA GPU of {_GPUS[recipe]}, and this is "
            f"{torch.cuda.get_device_name(device)}: write --precision.fp8 none, or --device cpu to emulate it"
        )


def _converted(linear: nn.Linear, recipe: str, emulate: bool, gather: bool) -> nn.Linear:
    if recipe == "mxfp8":
        from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

        from pretrain.engines.mxfp8 import MixedMXFP8Linear

        with torch.device("meta"):
            new = MixedMXFP8Linear(
                linear.in_features,
                linear.out_features,
                bias=False,
                kernel_preference=KernelPreference.EMULATED if emulate else KernelPreference.AUTO,
            )
        new.weight, new.bias = linear.weight, linear.bias
        return new
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    settings = Float8LinearConfig.from_recipe_name(recipe)
    settings = replace(settings, emulate=emulate, enable_fsdp_float8_all_gather=gather)
    return Float8Linear.from_float(linear, settings)


def refresh_scales(model: nn.Module) -> None:
    """After an update: the scales of all weights that FSDP gathers in 8 bits, in one all-reduce."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


class BytewiseAllGather:
    """FSDP's all-gather for gloo, which knows no 8-bit floats; for ``FSDPModule.set_custom_all_gather``."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until torch 2.12
        work: dist.Work | None = gather(
            output_tensor.view(torch.uint8), input_tensor.view(torch.uint8), group=group, async_op=async_op
        )
        return work


def is_gathered_in_float8(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and hasattr(parameter.to_local(), "fsdp_pre_all_gather")


def plain(tensor: Any) -> Any:
    """``tensor`` without torchao's wrapper around its local part, sharing storage."""
    if not (isinstance(tensor, DTensor) and is_gathered_in_float8(tensor)):
        return tensor
    inner = cast(Any, tensor.to_local())._tensor
    return DTensor(inner, tensor._spec, requires_grad=False)
