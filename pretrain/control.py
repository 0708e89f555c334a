"""Requests to stop, agreed by all ranks before any of them acts."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from pretrain.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Turns a signal to any rank, or a failure that only this rank may know of, into a decision of all ranks at the
    same step.

    Ranks acting on a flag of their own would tear the collectives that follow. Each step starts an all-reduce of the
    flags on the control group and reads the one that the step before started, so that the step never waits for it.
    A second interrupt raises KeyboardInterrupt at once: the last committed checkpoint is what remains.

    ``failed``: whether work beside the loop has failed here. It costs no wait either.
    """

    def __init__(self, world: World, failed: Callable[[], bool] = lambda: False) -> None:
        self._world = world
        self._failed = failed
        self._requested = False
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True

    def agreed(self) -> bool:
        """Whether all ranks stop before the coming step. Every rank calls this once a step."""
        wanted = self._requested or self._failed()
        if self._world.size == 1:
            return wanted
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._flag.item())
        self._flag.fill_(wanted)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        return stop

    def close(self) -> None:
        """Give the signals back, and finish the agreement that is under way."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
