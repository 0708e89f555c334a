"""Training steps that take turns: tokens per second, MFU, the loader's share, recompilations, ratios within a round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters

from tools.benching.contenders import VARIANTS, Contender
from tools.benching.machine import matmul_rate
from tools.benching.report import Row, Table
from tools.benching.timing import Spread, alternate, wait

_WARMUP = 3  # steps before the first round: compilation, allocations, the optimizer's state
_SETTLE = 1  # untimed steps at each turn: caches, and the loader's queue, which filled up while others had theirs


class Turn(NamedTuple):
    """Of a turn's steps together: seconds, those of them that batches held up, and graphs compiled meanwhile."""

    seconds: float
    waited: float
    compiled: int


def measure(contenders: Sequence[Contender], rounds: int, steps: int, device: torch.device) -> list[list[Turn]]:
    """By contender and round."""

    def turn(place: int, warming: bool) -> Turn:
        own = contenders[place].steps
        for _ in range(_WARMUP if warming else _SETTLE):
            own.step()
        if warming:
            return Turn(0.0, 0.0, 0)
        wait(device)
        graphs, waited, began = _graphs(), own.waited, time.perf_counter()
        for _ in range(steps):
            own.step()
        wait(device)
        return Turn(time.perf_counter() - began, own.waited - waited, _graphs() - graphs)

    return alternate([f"{c.variant} {c.name}" for c in contenders], turn, rounds)


def _graphs() -> int:
    """How many graphs torch.compile has compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def rates(contenders: Sequence[Contender], turns: Sequence[Sequence[Turn]], steps: int) -> list[list[float]]:
    """Tokens per second, by contender and round."""
    return [[steps * c.tokens / t.seconds for t in own] for c, own in zip(contenders, turns, strict=True)]


def speed_table(
    contenders: Sequence[Contender], turns: Sequence[Sequence[Turn]], steps: int, device: torch.device
) -> Table:
    """The limit is what matrix products alone, at their measured rate, would leave time for: the share of it is the MFU
    (telemetry/flops.py) against that rate."""
    peaks = {compute: matmul_rate(device, compute) for compute, _ in {VARIANTS[c.variant] for c in contenders}}
    rows = []
    for contender, own, rate in zip(contenders, turns, rates(contenders, turns, steps), strict=True):
        loading = sum(turn.waited for turn in own) / sum(turn.seconds for turn in own)
        more = {
            "parameters": f"{contender.parameters:,}",
            "loading": f"{100 * loading:.2f} %",
            "recompiled": str(sum(turn.compiled for turn in own)),
        }
        limit = peaks[VARIANTS[contender.variant][0]] / contender.flops
        rows.append(Row(f"{contender.variant} {contender.name}", rate, limit, more))
    reached = " and ".join(f"{peak / 1e12:.4g} TFLOP/s in {compute}" for compute, peak in sorted(peaks.items()))
    return Table(f"Training steps; matrix products alone reach {reached}", "tokens/s", rows, share="MFU")


def ratio_table(contenders: Sequence[Contender], rates: Sequence[Sequence[float]]) -> Table:
    """Tokens per second of one over those of another in the same round."""
    rows = [
        Row(
            f"{contenders[i].variant} {contenders[i].name} / {contenders[j].name}",
            [mine / theirs for mine, theirs in zip(rates[i], rates[j], strict=True)],
        )
        for i, j in pairs(contenders)
    ]
    return Table("Ratios, round by round", "ratio", rows)


def pairs(contenders: Sequence[Contender]) -> list[tuple[int, int]]:
    """Who is held against whom, by place and within a variant: our own against every reference, a twin against those
    that have its model, and our own after the first against the first."""
    found = []
    for i, one in enumerate(contenders):
        own_before = False
        for j, other in enumerate(contenders):
            if i == j or one.variant != other.variant or one.role == "reference":
                continue
            if other.role == "reference":
                if one.role == "own" or one.family == other.family:
                    found.append((i, j))
            elif one.role == other.role == "own" and j < i and not own_before:
                own_before = True
                found.append((i, j))
    return found


def remarks(
    contenders: Sequence[Contender], turns: Sequence[Sequence[Turn]], steps: int, variant: str, device: torch.device
) -> list[str]:
    """What a reader should know: recompilations in timed rounds, and the configuration in its own ``variant`` against
    nanoGPT as its README runs it on such a device, if both were measured: fp32 without compilation on a CPU, bf16 with
    it on a GPU."""
    lines = [
        f"warning: {c.variant} {c.name} compiled {count} graphs in timed rounds, which are slower for it"
        for c, own in zip(contenders, turns, strict=True)
        if (count := sum(turn.compiled for turn in own))
    ]
    rate = rates(contenders, turns, steps)
    shipped = "bf16+compile" if device.type == "cuda" else "fp32"
    theirs = [i for i, c in enumerate(contenders) if (c.name, c.variant) == ("nanogpt", shipped)]
    mine = [i for i, c in enumerate(contenders) if (c.role, c.variant) == ("own", variant)]
    if mine and theirs:
        ratio = Spread.of([a / b for a, b in zip(rate[mine[0]], rate[theirs[0]], strict=True)])
        lines.append(
            f"{contenders[mine[0]].name} as it says ({variant}) to nanogpt as it runs on {device.type} ({shipped}): "
            f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
        )
    return lines
