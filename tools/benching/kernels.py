"""Every fused kernel, forward and backward, beside plain PyTorch, torch.compile and Liger, and what memory allows.

The limit is the time in which the device's memory, at its measured copying speed, takes the bytes that the operation
cannot do without (operations.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch._functorch.config
from torch import Tensor

from models import kernels
from tools.benching.machine import copy_bandwidth
from tools.benching.operations import CASES, Case, Shapes
from tools.benching.report import Row, Table
from tools.benching.timing import alternate, timed

Work: TypeAlias = Callable[[], object]
_FLUSH = 1 << 28  # bytes written between two timed calls, so that no cache holds the operands
_REPEATS = 10  # calls in a turn, of which the median counts


def measure(
    names: Sequence[str], shapes: Shapes, device: torch.device, rounds: int, against_liger: bool
) -> list[Table]:
    """Microseconds of each of ``names``, a table of forwards and one of backwards."""
    bandwidth = copy_bandwidth(device)
    rows: dict[str, list[Row]] = {"forward": [], "backward": []}
    # Timed backwards keep their graph, to be run again; a compiled one may otherwise write into what it was given.
    with torch._functorch.config.patch(donated_buffer=False):
        for name in names:
            case = CASES[name]
            tensors, unit = case.make(shapes, device)
            works, absent = _prepared(case, tensors, device, against_liger)
            for place, (passes, what) in enumerate(zip(case.passes, rows, strict=True)):
                if passes:
                    calls = [work[place] for work in works.values()]
                    label = name if case.passes[1] else f"{name} and its gradient"
                    found = _seconds([f"{label}, {what}: {way}" for way in works], calls, device, rounds)
                    rows[what] += _rows(label, dict(zip(works, found, strict=True)), absent, passes * unit, bandwidth)
    reached = f"copies reach {bandwidth / 1e9:.4g} GB/s"
    return [Table(f"{what.capitalize()}; {reached}", "µs", own, is_cost=True) for what, own in rows.items() if own]


def _prepared(
    case: Case, tensors: list[Tensor], device: torch.device, against_liger: bool
) -> tuple[dict[str, tuple[Work, Work | None]], dict[str, str]]:
    """What is timed, forward and backward, of every way to compute ``case``; and why others are not."""
    fused = kernels.uses_triton(device)
    ways: dict[str, Callable[..., Any]] = {"triton" if fused else "twin in PyTorch": case.ours}
    ways |= {"eager": case.plain, "torch.compile": case.compiled()}
    absent = {} if fused else {"triton": "kernels: not measured without a GPU"}
    if against_liger:
        if case.liger is None:
            absent["liger"] = "it has none"
        elif device.type != "cuda":
            absent["liger"] = "not measured without a GPU"
        else:
            ways["liger"] = case.liger
    works: dict[str, tuple[Work, Work | None]] = {}
    for way, function in ways.items():
        own = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
        try:
            works[way] = _works(function, own, bool(case.passes[1]))
        except Exception as error:  # of a compiler or another library: it costs its own row alone
            absent[way] = f"failed: {(str(error).strip().splitlines() or [type(error).__name__])[0][:80]}"
    return works, absent


def _seconds(
    names: Sequence[str], calls: Sequence[Work | None], device: torch.device, rounds: int
) -> list[list[float]]:
    return alternate(names, lambda place, _: call_seconds(calls[place], device), rounds)


def _rows(name: str, found: dict[str, list[float]], absent: dict[str, str], least: int, bandwidth: float) -> list[Row]:
    rows = []
    for way, seconds in found.items():
        more: dict[str, str | float | None] = {"GB/s": least / statistics.median(seconds) / 1e9}
        for other in ("eager", "torch.compile"):
            if other in found and other != way:
                more[f"{other} / it"] = statistics.median(b / a for a, b in zip(seconds, found[other], strict=True))
        rows.append(Row(f"{name}: {way}", [1e6 * s for s in seconds], 1e6 * least / bandwidth, more))
    return rows + [Row(f"{name}: {way}", [], why=why) for way, why in absent.items()]


def _works(function: Callable[..., Any], tensors: list[Tensor], backward: bool) -> tuple[Work, Work | None]:
    """What is timed, forward and backward, after one call of each."""

    def forward() -> Any:
        return function(*tensors)

    results = forward()
    if not backward:
        return forward, None
    results = results if isinstance(results, tuple) else (results,)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    gradients = [torch.randn_like(result) for result in results]

    def back() -> object:
        return torch.autograd.grad(results, wanted, gradients, retain_graph=True)

    back()
    return forward, back


def call_seconds(work: Work | None, device: torch.device) -> float:
    """The median of some calls. On a GPU by its own clock, so that what the host needs to launch kernels counts only
    where the device waits for it, and with operands that no cache holds; a CPU's caches are left as they are."""
    assert work is not None
    if device.type != "cuda":
        return statistics.median(timed(work) for _ in range(_REPEATS))
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_REPEATS)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3
