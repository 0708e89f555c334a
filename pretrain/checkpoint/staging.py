"""Copies in the CPU's memory, to be written while training changes the originals."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def stage(state: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested dictionaries of (D)Tensors and plain values, with every tensor, or this rank's part of it, on
    the CPU.

    The memory of ``earlier``, which an earlier call returned and nobody reads any more, is used again where it fits.
    New memory for a tensor on a GPU is pinned, so that all copies are under way at once; they have arrived on return.
    """
    copy: dict[str, Any] = _copy(state, earlier)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copy


def _copy(value: Any, earlier: Any) -> Any:
    if isinstance(value, dict):
        earlier = earlier if isinstance(earlier, dict) else {}
        return {key: _copy(inner, earlier.get(key)) for key, inner in value.items()}
    if isinstance(value, DTensor):
        local = _copy(value.to_local(), earlier.to_local() if isinstance(earlier, DTensor) else None)
        return DTensor(local, value._spec, requires_grad=False)  # from_local would move it to the mesh's device
    if isinstance(value, Tensor):
        fits = isinstance(earlier, Tensor) and (earlier.shape, earlier.dtype) == (value.shape, value.dtype)
        memory = earlier if fits else torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return memory.copy_(value, non_blocking=True)
    return deepcopy(value)
