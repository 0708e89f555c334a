"""The most memory that a rank holds in a step, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.planning.layout import Layout, Moment
from pretrain.planning.terms import Terms
from pretrain.planning.trace import Trace


@dataclass(frozen=True)
class Peak:
    moment: Moment
    terms: Terms


def find_peak(layout: Layout, trace: Trace) -> Peak:
    """The largest of all moments of the step's last micro-batch, with the optimizer's state of earlier steps."""
    moments = (Peak(moment, layout.held(moment) + own) for moment, own in _timeline(trace))
    return max(moments, key=lambda found: found.terms.total)


def _timeline(trace: Trace) -> Iterator[tuple[Moment, Terms]]:
    """Each moment with what the trace has for it."""
    yield Moment("embedding"), trace.embedding
    saved = [trace.embedding_saved]  # when each block begins, and after the last
    for index, block in enumerate(trace.blocks):
        yield Moment("forward", index), saved[-1] + block.forward
        saved.append(saved[-1] + block.saved)
    yield Moment("loss"), saved[-1] + trace.loss
    yield Moment("loss_backward"), saved[-1] + trace.loss_backward
    for index in reversed(range(len(trace.blocks))):
        yield Moment("backward", index), saved[index] + trace.blocks[index].backward
        yield Moment("reduce", index), saved[index]
    yield Moment("embedding_backward"), trace.embedding_backward
    yield Moment("reduce_root"), Terms()
    yield Moment("step"), Terms()
