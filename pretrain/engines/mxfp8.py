"""torchao's mxfp8 linear over fp32 weights. Imported only where torchao is there."""

from __future__ import annotations

from torch import Tensor
from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear, _to_mxfp8_then_scaled_mm


class MixedMXFP8Linear(MXFP8Linear):
    """Casts the weight to its input's dtype, as autocast does for a plain linear: torchao's takes both of one."""

    def forward(self, input: Tensor) -> Tensor:
        output = _to_mxfp8_then_scaled_mm(
            input,
            self.weight.to(input.dtype),
            kernel_preference=self.kernel_preference,
            scale_calculation_mode=self.scale_calculation_mode,
            wgrad_with_hp=self.wgrad_with_hp,
        )
        return output if self.bias is None else output + self.bias.to(output.dtype)
