"""The fused kernels of models/kernels, or one line that says what they lack here."""

from __future__ import annotations

import torch
from torch import nn

from models import kernels
from models.errors import ConfigError
from pretrain.engines.compiling import missing_compiler


def fuse_kernels(model: nn.Module, choice: str, device: torch.device) -> list[str]:
    """Make the model compute as ``train.kernels`` says; a line for the start of a run where that is not plain."""
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return []
    lack = _lacking(device)
    if lack is None:
        kernels.fuse(model)
        return ["kernels: Triton" + ("" if device.type == "cuda" else ", interpreted")]
    if choice == "triton":
        raise ConfigError(f"train.kernels triton needs {lack}, or write --train.kernels torch")
    return [f"kernels: PyTorch's; Triton's need {lack}"]


def _lacking(device: torch.device) -> str | None:
    if not kernels.is_installed():
        return "Triton, which is not here: pip install triton"
    if device.type != "cuda":
        return None if kernels.is_interpreted() else "a GPU, which is not here: give it one"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability 8.0, and this GPU has {major}.{minor}: take another"
    compiler = missing_compiler(device)
    return compiler and f"{compiler}, which is not here: install it"
