"""What this rank holds of the parameters, as plain tensors, in portions that bound what a step allocates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Temporaries (Nesterov's look-ahead, moments widened from bf16, noise) exist for this many elements at a time, so
# that a 7B model stepping on one GPU does not pay for a second copy of its state: 64 MiB in fp32. A CPU takes
# portions that its cache holds: a step over bf16 moments is two to three times as fast as with the GPU's.
CHUNK_ELEMENTS = 2**24
CHUNK_ELEMENTS_CPU = 2**18


class Slice(NamedTuple):
    """One parameter as this rank holds it, or a piece of that: plain local tensors of one shape."""

    parameter: Tensor
    gradient: Tensor
    moments: tuple[Tensor, ...]
    scalar: Tensor | None  # the parameter's own number, fp32 [], where its optimizer keeps one: a count of steps, say
    number: int  # of the parameter in its group
    shard: tuple[int, ...]  # this rank's coordinates along the mesh dimensions that shard it: () for a whole tensor
    piece: int = 0


def local_slice(parameter: Tensor, moments: tuple[Tensor, ...], scalar: Tensor | None, number: int) -> Slice:
    """The local tensors of a parameter that has a gradient; they may be empty."""
    gradient = parameter.grad
    assert gradient is not None
    if not isinstance(parameter, DTensor):
        return Slice(parameter, gradient, moments, scalar, number, ())
    assert isinstance(gradient, DTensor)
    # Under sequence parallelism a replicated gain gets a partial gradient; where they agree this does nothing.
    gradient = gradient.redistribute(placements=parameter.placements)
    coordinates = parameter.device_mesh.get_coordinate()
    assert coordinates is not None
    # Ranks that replicate a shard have the same of these.
    shard = tuple(c for c, p in zip(coordinates, parameter.placements, strict=True) if not p.is_replicate())
    local = tuple(moment.to_local() for moment in moments if isinstance(moment, DTensor))
    assert len(local) == len(moments)
    return Slice(parameter.to_local(), gradient.to_local(), local, scalar, number, shard)


def chunks(slices: list[Slice]) -> Iterator[list[Slice]]:
    """Portions of about as many elements as temporaries may have; larger slices in pieces along the first dimension."""
    chunk: list[Slice] = []
    elements = 0
    for piece in (piece for one in slices for piece in _pieces(one)):
        if chunk and elements + piece.parameter.numel() > _largest(piece.parameter.device):
            yield chunk
            chunk, elements = [], 0
        chunk.append(piece)
        elements += piece.parameter.numel()
    yield chunk


def _largest(device: torch.device) -> int:
    return CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS


def _pieces(one: Slice) -> Iterator[Slice]:
    elements, largest = one.parameter.numel(), _largest(one.parameter.device)
    if elements <= largest:
        yield one
        return
    rows = max(1, one.parameter.shape[0] * largest // elements)
    parts = zip(*(tensor.split(rows) for tensor in (one.parameter, one.gradient, *one.moments)), strict=True)
    for piece, (parameter, gradient, *moments) in enumerate(parts):
        yield one._replace(parameter=parameter, gradient=gradient, moments=tuple(moments), piece=piece)
