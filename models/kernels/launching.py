"""What all kernels share: where they run, how they see tensors, how many programs share a sum.

Block sizes and warps are fixed rules of the width. These kernels are bound by memory, and once a program has some
thousands of elements in flight it moves as much as the memory gives: autotuning would gain a few percent, take
seconds of every run's start, and let two ranks, or two runs, add in different orders.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

WIDEST = 32768  # features of a row that one program holds at once


@cache
def is_installed() -> bool:
    return find_spec("triton") is not None


@cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 before Triton is imported."""
    return is_installed() and bool(importlib.import_module("triton").knobs.runtime.interpret)


def uses_triton(device: torch.device) -> bool:
    """Whether tensors of ``device`` go to Triton; others go to the plain PyTorch twins."""
    return is_installed() if device.type == "cuda" else device.type == "cpu" and is_interpreted()


def runs_triton(x: Tensor, whole_rows: bool = False) -> bool:
    """Whether a kernel can take ``x``: it has elements, of at most 32 bits, and if a program has to hold
    ``whole_rows``, rows that it can hold."""
    fits = x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return fits and not (whole_rows and x.shape[-1] > WIDEST) and uses_triton(x.device)


def kernel(home: str, name: str) -> Any:
    """A Triton kernel of ``models.kernels.jit``, imported, and Triton with it, when it is first launched."""
    return getattr(importlib.import_module(f"models.kernels.jit.{home}"), name)


def rows_of(x: Tensor) -> Tensor:
    """``x`` as [rows, width] with elements of a row side by side: a view where its strides allow one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def empty_sum(x: Tensor, branch: Tensor) -> Tensor:
    """Room for ``x + branch``."""
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))


def power_of_two(count: int) -> int:
    """The smallest power of 2 that is not below ``count``."""
    return 1 << max(0, count - 1).bit_length()


def tile(width: int, elements: int, columns: int = WIDEST) -> tuple[int, int]:
    """(rows, columns) of what a program has in hand: about ``elements``, at most ``columns`` of a row."""
    columns = min(power_of_two(width), columns)
    return max(1, elements // columns), columns


def warps(elements: int) -> int:
    """For so many elements at once: at most 16 in a thread, so that several arrays fit into its registers."""
    return min(16, max(4, power_of_two(elements) // 512))


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def tiled(rows: int, width: int, elements: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of programs that have a ``tile`` in hand each, and the launch's settings that say so."""
    block = tile(width, elements, columns)
    settings = {"ROWS": block[0], "COLUMNS": block[1], "num_warps": warps(block[0] * block[1])}
    return (-(-rows // block[0]), -(-width // block[1])), settings


def adders(x: Tensor, tiles: int, per_processor: int, across: int = 1) -> int:
    """How many programs go over ``tiles`` of rows and add, where ``across`` of them share a row: together
    ``per_processor`` for each processor, what runs at once. Each leaves one partial sum, and these are added in a fixed
    order: no atomics, so the same numbers every time."""
    most = _processors(x.device.index) * per_processor if x.is_cuda else 3 * across  # interpreted: three, to be several
    return max(1, min(tiles, most // across))
