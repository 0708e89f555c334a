"""Parameters and steps for tests of optimizers: gradients and learning rates depend on the step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Shapes = Sequence[tuple[int, ...]]


def _drawn(shapes: Shapes, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def parameters(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(tensor) for tensor in _drawn(shapes, dtype, seed)]


def gradients(shapes: Shapes, step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return _drawn(shapes, dtype, 1000 + step)


def train(
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    gradients: Callable[[int, torch.dtype], list[Tensor]],
    lr: Callable[[int], float],
) -> None:
    """Steps of the optimizer alone: ``gradients`` and ``lr`` say what each is taken under."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        for parameter, gradient in zip(held, gradients(step, held[0].dtype), strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
