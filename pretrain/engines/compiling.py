"""torch.compile, or one line that says what it lacks here."""

from __future__ import annotations

import os
import shlex
import shutil

import torch
from torch import nn

from models.errors import ConfigError


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks to build C++ on a CPU, and Triton to build a launcher in C on a GPU; None if nothing."""
    if device.type == "cuda":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        names = [os.environ.get("CXX", "g++")]
    found = any(shutil.which(shlex.split(name)[0]) for name in names)  # CXX may be "ccache g++"
    return None if found else " or ".join(names)


def require_compiler(device: torch.device) -> None:
    """ConfigError without one."""
    lack = missing_compiler(device)
    if lack is not None:
        raise ConfigError(f"train.compile needs {lack}, which is not here: install it, or write --train.compile false")


def compile_blocks(blocks: nn.ModuleList, device: torch.device, cuda_graphs: bool) -> None:
    """Each block by itself: all have the same code, so one compilation serves them, and FSDP wraps them unchanged.

    With ``cuda_graphs`` a block's kernels are recorded once and replayed, forward and backward each by one launch.
    """
    require_compiler(device)
    for block in blocks:
        block.compile(mode="reduce-overhead" if cuda_graphs else None)
