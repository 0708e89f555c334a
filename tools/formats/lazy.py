"""Tensors that are read when they are asked for: one at a time is in memory, however large the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LazyTensor:
    """``read`` makes a contiguous tensor of ``shape`` and ``dtype`` on the CPU, new each time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(LazyTensor):
    """One whose values lie in a file one after the other, from byte ``offset`` on."""

    path: Path
    offset: int

    def part(self, begin: int, count: int) -> Tensor:
        """``count`` of its values from the ``begin``-th on, [count]; the others are not read."""
        assert 0 <= begin <= begin + count <= math.prod(self.shape)
        return in_file(self.path, self.offset + begin * self.dtype.itemsize, (count,), self.dtype).read()


def in_file(path: Path, offset: int, shape: Iterable[int], dtype: torch.dtype) -> StoredTensor:
    """Raw little-endian values."""
    shape = tuple(shape)

    def read() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        # Read, not mapped: the pages of a mapping stay in the process's memory until all of the file does.
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            left = memory_of(tensor)
            while left.nbytes:
                count = file.readinto(left)
                if not count:
                    raise ConfigError(f"{path} ends in the middle of a tensor: get it again")
                left = left[count:]
        return tensor

    return StoredTensor(shape, dtype, read, path, offset)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def filled(value: float, shape: Iterable[int], dtype: torch.dtype) -> LazyTensor:
    """A tensor of one number everywhere, that takes no memory before it is read."""
    size = tuple(shape)
    return LazyTensor(size, dtype, partial(torch.full, size, value, dtype=dtype))


def cast(tensor: LazyTensor, dtype: torch.dtype, name: str) -> LazyTensor:
    """``tensor`` in another dtype. ConfigError, when it is read, if a finite value would become infinite."""
    if tensor.dtype == dtype:
        return tensor
    narrows = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max

    def read() -> Tensor:
        wide = tensor.read()
        narrow = wide.to(dtype)
        if narrows and (narrow.isinf() & wide.isfinite()).any():
            raise ConfigError(f"{name} has values beyond the range of {str(dtype)[6:]}: write --dtype bf16 or fp32")
        return narrow

    return LazyTensor(tensor.shape, dtype, read)


def transposed(tensor: LazyTensor) -> LazyTensor:
    """A matrix with its axes exchanged; a vector as it is."""
    if len(tensor.shape) != 2:
        return tensor
    rows, columns = tensor.shape
    return LazyTensor((columns, rows), tensor.dtype, lambda: tensor.read().mT.contiguous())


def split(tensor: LazyTensor, parts: int) -> list[LazyTensor]:
    """Equal parts along the first axis. While one after the other is read, the whole is read once."""
    size = tensor.shape[0] // parts
    whole: list[Tensor] = []

    def part(index: int) -> Tensor:
        if not whole:
            whole.append(tensor.read())
        mine = whole[0][index * size : (index + 1) * size].clone()
        if index == parts - 1:
            whole.clear()
        return mine

    shape = (size, *tensor.shape[1:])
    return [LazyTensor(shape, tensor.dtype, lambda index=index: part(index)) for index in range(parts)]  # type: ignore[misc]


def joined(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """One after the other along the first axis."""
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    return LazyTensor(shape, tensors[0].dtype, lambda: torch.cat([tensor.read() for tensor in tensors]))
