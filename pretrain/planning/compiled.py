"""Blocks that save what torch.compile would save, without being compiled.

A compiled block is one operation to autograd. What it keeps for its backward is a minimum cut through forward and
backward together: results that are cheap to compute again are not kept. Here torch's own partitioner makes that cut,
and both halves run as they are. While they run they hold more than compiled code, which fuses operations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.func import functional_call


def save_as_compiled(blocks: nn.ModuleList) -> None:
    """Exchange the blocks' forwards for functions, which the first call traces: one for all that have the same code."""
    known: dict[tuple[Any, ...], Callable[..., Any]] = {}
    for block in blocks:
        names = [name for name, _ in block.named_parameters()]
        code = (*names, *(type(module) for module in block.modules()))
        if code not in known:
            known[code] = _split(block, names)
        block.forward = partial(known[code], list(block.parameters()))


def _split(block: nn.Module, names: list[str]) -> Callable[..., Any]:
    eager = _Eager(block)

    def forward(parameters: list[Tensor], *arguments: Any) -> Tensor:
        own = {f"block.{name}": parameter for name, parameter in zip(names, parameters, strict=True)}
        return functional_call(eager, own, arguments)

    return aot_function(forward, _as_it_is, _as_it_is, partition_fn=min_cut_rematerialization_partition)


class _Eager(nn.Module):
    """A block by the forward that it had."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self._forward: Callable[..., Tensor] = block.forward

    def forward(self, *arguments: Any) -> Tensor:
        return self._forward(*arguments)


def _as_it_is(gm: Callable[..., Any], example_inputs: Any) -> Callable[[list[Any]], Any]:
    """The compiler that compiles nothing. What it makes takes all arguments in one list."""

    def run(arguments: list[Any]) -> Any:
        return gm(*arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
