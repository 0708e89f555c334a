"""Requests to stop or to save, agreed by all ranks before any of them acts."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from pretrain import launched
from pretrain.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_FILE, SAVE_FILE = "stop", "save"  # in the run's folder
_LOOK = 1.0  # seconds between two looks for the files


class Stop(IntEnum):
    """Why a run stops. Of several reasons the largest counts: who stops it by hand does not want it started again."""

    NO = 0
    SIGNAL = 1
    FILE = 2
    FAILED = 3


class Request(NamedTuple):
    """What a run is asked for: to end, to commit a checkpoint."""

    stop: Stop
    save: bool

    def and_also(self, other: Request) -> Request:
        """What both ask for."""
        return Request(max(self.stop, other.stop), self.save or other.save)


class Requests:
    """Turns a signal to any rank, a file in the run's folder, or a failure that only this rank may know of, into a
    decision of all ranks at the same step.

    Ranks acting on a flag of their own would tear the collectives that follow. Each step starts an all-reduce of the
    flags on the control group and reads the one that the step before started, so that the step never waits for it.
    A second interrupt raises KeyboardInterrupt at once: the last committed checkpoint is what remains.

    SIGUSR1 stays blocked and is looked for in each step. A scheduler that sends it to all processes would else end the
    compilers that the run has started, which inherit what is blocked and have no handler.

    ``run``: the run's folder; the first rank looks there for files called stop and save, and in the launcher's folder
    for stop. ``failed``: whether work beside the loop has failed here. Neither costs a wait for the device.
    """

    def __init__(self, world: World, run: Path, failed: Callable[[], bool] = lambda: False) -> None:
        self._world, self._run, self._launch = world, run, launched.folder()
        self._failed = failed
        self._stop = Stop.NO
        self._saving = False
        self._looked = -_LOOK
        self._flags = torch.zeros(2, dtype=torch.int32)
        self._pending: dist.Work | None = None
        self._signalled = False
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # as __main__ has done from its start

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def agreed(self) -> Request:
        """What all ranks do before the coming step. Every rank calls this once a step."""
        wanted = self._wanted()
        if self._world.size == 1:
            return wanted
        agreed = Request(Stop.NO, False)
        if self._pending is not None:
            self._pending.wait()
            stop, save = self._flags.tolist()
            agreed = Request(Stop(stop), bool(save))
        self._flags = torch.tensor(wanted, dtype=torch.int32)
        self._pending = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        return agreed

    def _wanted(self) -> Request:
        save = self._look() if self._world.is_main else False
        self._take_pending()
        if self._signalled:
            self._stop = max(self._stop, Stop.SIGNAL)
        if self._failed():
            self._stop = Stop.FAILED
        return Request(self._stop, save)

    def _take_pending(self) -> None:
        if signal.SIGUSR1 in signal.sigpending():
            signal.sigwait({signal.SIGUSR1})  # returns at once
            self._signalled = True

    def _look(self) -> bool:
        """For files; whether a checkpoint is asked for. A request to save is told once until it is done."""
        if time.monotonic() - self._looked < _LOOK:
            return False
        self._looked = time.monotonic()
        if self._launch is not None and (self._launch / launched.STOP).exists():
            self._stop = max(self._stop, Stop.SIGNAL)
        if (self._run / STOP_FILE).exists():
            self._stop = max(self._stop, Stop.FILE)
        save = not self._saving and (self._run / SAVE_FILE).exists()
        self._saving |= save
        return save

    def done(self, request: Request) -> None:
        """A checkpoint is committed: the files that asked for it go."""
        if not self._world.is_main:
            return
        with suppress(OSError):  # one that cannot be removed is not obeyed for ever: it was told once
            if request.stop is Stop.FILE:
                (self._run / STOP_FILE).unlink(missing_ok=True)
            if request.save:
                (self._run / SAVE_FILE).unlink(missing_ok=True)
                self._saving = False

    def close(self) -> None:
        """Give the signals back, and finish the agreement that is under way."""
        self._take_pending()  # or giving the handlers back would end the process
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
