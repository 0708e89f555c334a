"""Arithmetic is fp32 whatever the dtype of what is stored."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32 if it is narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
