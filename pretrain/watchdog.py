"""Ranks watch each other, so that one that dies or hangs ends the run within a stated time, and by name.

A thread in every rank writes a beat into the rendezvous store every period (2 s, or a fifth of parallel.silence if that
is less), over a connection of its own: where the rank is, and how many collectives it has issued, which tells a rank
that computes forever from those that wait for it. Rank 0 reads all beats, the others read rank 0's and the verdict, so
that the store's work grows with the ranks and not with their square. If rank 0 falls silent, the others judge that.

From the fault to the end of every other rank, with the defaults:

- a rank failed with an error of its own: 5 periods, 10 s, and its traceback;
- it was killed: 9 periods, 18 s, if that broke a collective or the launcher noticed it (either makes the watch accept
  only 5 missed beats; torchrun sends SIGTERM to the other ranks, and SIGKILL 30 s later); else as if frozen;
- it is frozen, or its machine is gone: parallel.silence + 4 periods, 38 s;
- it computes or sleeps forever, while its thread beats: parallel.timeout + 4 periods;
- the store is gone, and the first node with it: parallel.silence + 2 periods.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from math import inf
from types import FrameType
from typing import Literal

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from models.errors import ConfigError
from pretrain import launched

Phase = Literal["start", "data", "step", "validation", "checkpoint"]
State = Literal["running", "failed", "left"]

_PERIOD = 2.0  # seconds between two beats
_MISSED = 5  # beats, once something says that a rank is gone
_NAMED = 4  # ranks named with host and process; of more, only the numbers
_AFTERWARDS = "every rank ends; start again to go on from the last committed checkpoint"


def period_of(silence: float) -> float:
    """Seconds between two beats: silence is never less than five of them."""
    return min(_PERIOD, silence / _MISSED)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int  # grows, which is how a new beat is known
    host: str
    process: int
    step: int = 0
    phase: Phase = "start"
    collectives: int = 0  # issued so far, over all groups
    state: State = "running"
    error: str = ""  # of a failed rank, one line
    alarm: bool = False  # it got SIGTERM, which may mean that another rank is gone

    @property
    def place(self) -> str:
        return "at start" if self.phase == "start" else f"in step {self.step} ({self.phase})"


@dataclass(frozen=True)
class Seen:
    """A rank as the one that watches it knows it. Times are the watcher's own, in seconds."""

    beat: Beat
    heard: float  # its last new beat
    moved: float  # its last progress: another step or phase, or one more collective
    alarmed: float = inf  # its first alarm or failure
    failed: float = inf  # its first word of a failure

    def then(self, beat: Beat, now: float) -> Seen:
        """What is known once ``beat`` has been read, which may be the same as before."""
        old = self.beat
        moved = (beat.step, beat.phase, beat.collectives) != (old.step, old.phase, old.collectives)
        failed = min(self.failed, now if beat.state == "failed" else inf)
        return Seen(
            beat,
            heard=now if beat.number != old.number else self.heard,
            moved=now if moved else self.moved,
            alarmed=min(self.alarmed, failed, now if beat.alarm else inf),
            failed=failed,
        )


@dataclass(frozen=True)
class Verdict:
    """How the run ends: ranks in ``own`` with their own errors, all others at once; the rank ``by`` says ``text``."""

    text: str
    own: tuple[int, ...] = ()
    by: int = 0


def judge(seen: Mapping[int, Seen], size: int, now: float, silence: float, timeout: float) -> Verdict | None:
    """The verdict on ``seen`` of ``size`` ranks, None as long as there is hope. A part of them shows silence alone."""
    present = {rank: one for rank, one in seen.items() if one.beat.state != "left"}
    period = period_of(silence)
    alarm = min((one.alarmed for one in present.values()), default=inf)

    silent = {
        rank: one
        for rank, one in present.items()
        if now - one.heard > silence or now - max(one.heard, alarm) > _MISSED * period
    }
    if silent:
        last = max(silent.values(), key=lambda one: one.heard)
        have, end = ("has", "it was killed, or its") if len(silent) == 1 else ("have", "they were killed, or their")
        return Verdict(
            f"{_names(silent, size)} {have} not been heard of for {now - last.heard:.0f} s, last {last.beat.place}: "
            f"{end} machine froze; {_AFTERWARDS}"
        )
    if len(seen) < size:
        return None

    failed = {rank: one for rank, one in present.items() if one.beat.state == "failed"}
    running = {rank: one for rank, one in present.items() if one.beat.state == "running"}
    if failed and not running:  # an error that all ranks agreed on, or a signal to all of them
        return Verdict("", tuple(failed))
    if failed:
        rank, first = min(failed.items(), key=lambda item: (item[1].failed, item[0]))
        if any(one.heard <= first.failed + period for one in running.values()):
            return None  # the error may be the echo of the death of one that was not heard of since
        text = f"{_names({rank: first}, size)} failed {first.beat.place}: {first.beat.error}; {_AFTERWARDS}"
        return Verdict(text, (rank,))

    if running and (idle := now - max(one.moved for one in running.values())) > timeout:
        done = {rank: (one.beat.step, one.beat.collectives) for rank, one in running.items()}
        behind = {rank: one for rank, one in running.items() if done[rank] == min(done.values())}
        place = next(iter(behind.values())).beat.place
        if len(behind) == len(running):
            who, why = "all ranks have", "their work takes longer than parallel.timeout, or their network is broken"
        else:
            have, it = ("has", "it") if len(behind) == 1 else ("have", "them")
            who, why = f"{_names(behind, size)} {have}", f"the others wait for {it}"
        return Verdict(f"{who} made no progress for {idle:.0f} s, {place}: {why}; {_AFTERWARDS}")
    return None


def _names(ranks: Mapping[int, Seen], size: int) -> str:
    if len(ranks) > _NAMED:
        return f"ranks {', '.join(map(str, ranks))} of {size}"
    return ", ".join(
        f"rank {rank} of {size} (host {one.beat.host}, process {one.beat.process})" for rank, one in ranks.items()
    )


class Watchdog:
    """One rank's part in the watch. All ranks make one, in the main thread, after joining the default group.

    ``store`` is the ranks' rendezvous store; ``silence`` and ``timeout`` are parallel.silence and parallel.timeout.
    While it is on, a SIGTERM that nothing else handles raises SystemExit.
    """

    def __init__(self, store: Store, rank: int, size: int, silence: float, timeout: float) -> None:
        self._rank, self._size, self._silence, self._timeout = rank, size, silence, timeout
        self._period = period_of(silence)
        self._beat = Beat(0, socket.gethostname(), os.getpid())
        self._step: tuple[int, Phase] = (0, "start")
        self._state: State = "running"
        self._error = ""
        self._alarm = False
        self._answers = 0  # of the store
        self._released = threading.Event()

        self._store = PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=silence))
        self._watched = range(size) if rank == 0 else sorted({0, rank})
        self._keys = ["verdict", *map(str, self._watched)]
        self._store.set(str(rank), json.dumps(asdict(self._beat)))
        if rank == 0:
            self._store.set("verdict", "")
        self._store.wait(self._keys, timedelta(seconds=timeout))  # from here on a read never waits for a key

        # A main thread that is stuck in a collective runs no handler, but the signal's number arrives here.
        self._wake, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        self._previous_bell = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        self._previous = signal.signal(signal.SIGTERM, self._terminated)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="watchdog's guard", daemon=True).start()

    # ------------------------------------------------------------------ the main thread

    def at(self, step: int, phase: Phase) -> None:
        """This rank begins ``phase`` of ``step`` (counted from 1)."""
        self._step = (step, phase)

    def failed(self, error: BaseException) -> None:
        """Returns if ``error`` is to be raised: it is this rank's own, or no other rank is at fault.

        If it is the echo of another's end, as every collective with a dead rank is, the process ends here instead.
        """
        if isinstance(error, ConfigError) and error.agreed:
            return
        self._error = one_line(error)
        self._state = "failed"
        self._ring()
        self._released.wait(2 * self._silence)

    def leave(self) -> None:
        """This rank is through: its silence means nothing from now on. To be called before the groups are gone."""
        if self._state == "running":
            self._state = "left"
        self._ring()
        self._thread.join(2 * self._period)  # it reads the groups' counters
        signal.set_wakeup_fd(self._previous_bell)
        signal.signal(signal.SIGTERM, self._previous)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        if self._state == "running":  # else it is ending, and waits to hear why
            raise SystemExit(128 + number)

    def _ring(self) -> None:
        os.write(self._bell, b"\0")

    # ------------------------------------------------------------------ threads

    def _watch(self) -> None:
        seen: dict[int, Seen] = {}
        now, before = 0.0, time.monotonic()
        while not self._released.is_set():
            elapsed, before = time.monotonic() - before, time.monotonic()
            now += min(elapsed, 2 * self._period)  # nothing is heard while this process itself is frozen
            state = self._state
            try:
                self._look(seen, now, state)
            except RuntimeError:  # the store's errors; how long it may be gone is the guard's business
                time.sleep(self._period)
            if state == "left":
                return

    def _look(self, seen: dict[int, Seen], now: float, state: State) -> None:
        """Write a beat, read those of others, act on what they show, and wait for the next."""
        step, phase = self._step
        self._beat = replace(
            self._beat,
            number=self._beat.number + 1,
            step=step,
            phase=phase,
            collectives=_collectives(),
            state=state,
            error=self._error,
            alarm=self._alarm,
        )
        self._store.set(str(self._rank), json.dumps(asdict(self._beat)))
        if state == "left":
            return
        posted, *beats = self._store.multi_get(self._keys)
        self._answers += 1
        for rank, content in zip(self._watched, beats, strict=True):
            beat = Beat(**json.loads(content))
            seen[rank] = seen.get(rank, Seen(beat, now, now)).then(beat, now)
        if posted:
            self._obey(Verdict(**json.loads(posted)))
        elif verdict := judge(seen, self._size, now, self._silence, self._timeout):
            self._announce(verdict)
        else:
            self._sleep()

    def _sleep(self) -> None:
        waiting = select.poll()
        waiting.register(self._wake, select.POLLIN)
        if waiting.poll(1000 * self._period) and signal.SIGTERM in os.read(self._wake, 4096):
            self._alarm = True

    def _announce(self, verdict: Verdict) -> None:
        """Post the verdict and say it, unless another rank came first."""
        posted = self._store.compare_set("verdict", "", json.dumps(asdict(replace(verdict, by=self._rank))))
        verdict = Verdict(**json.loads(posted))
        if verdict.by == self._rank:
            if verdict.text:
                _say(f"error: {verdict.text}")
            time.sleep(2 * self._period)  # others read it: the store may be this process's own, and a launcher kills
        self._obey(verdict)

    def _obey(self, verdict: Verdict) -> None:
        if self._rank not in verdict.own:
            _end()
        self._released.set()

    def _guard(self) -> None:
        """End the process where the watch cannot: a store whose machine is gone may never answer a request, and a
        rank that was released with its own error may hang on its way out."""
        missed = 0
        while missed * self._period <= self._silence:
            answers = self._answers
            time.sleep(self._period)
            if self._state == "left":
                return
            missed = 0 if self._answers > answers else missed + 1
        if not self._released.is_set():
            _say(
                f"error: rank {self._rank} of {self._size} has had no answer from the rendezvous store for "
                f"{self._silence:.0f} s: the launcher of the first node, or that node, is gone; this rank ends; "
                "start again to go on from the last committed checkpoint"
            )
        _end()


def _collectives() -> int:
    """How many this process has issued, over all its groups, whether or not they are done."""
    issued = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            issued += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        except RuntimeError:  # a backend that does not count
            continue
    return issued


def one_line(error: BaseException) -> str:
    """The error as the line that names its rank says it."""
    if isinstance(error, SystemExit):
        return "it was told to end (SIGTERM)"
    text = str(error).strip()
    last = text.splitlines()[-1] if text else ""  # an error that was handed on as a traceback ends with what it says
    return last if isinstance(error, ConfigError) else f"{type(error).__name__}: {last[:300]}"


def _say(line: str) -> None:
    launched.crashed(line)
    bar = "\n\x1b[?25h" if sys.stderr.isatty() else ""  # below the progress bar, which hid the cursor
    print(bar + line, file=sys.stderr, flush=True)


def _end() -> None:
    """At once: the main thread may be in a collective that nothing interrupts. The metrics are flushed at each line."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
