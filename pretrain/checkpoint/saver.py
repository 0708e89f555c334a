"""The saves of a run: in the step, or staged in the step and written beside the training."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from pretrain.checkpoint.checkpointer import Checkpointer
from pretrain.checkpoint.staging import stage

log = logging.getLogger(__name__)

_IMPATIENCE = 5.0  # seconds that a write has left after KeyboardInterrupt


class Saver:
    """Saves through ``checkpointer``, one at a time, and tells ``report`` of each in a line.

    ``asynchronous``: `save` returns once the state is copied into memory that training does not touch; a thread then
    calls `Checkpointer.save`, which is all that the other mode does. The memory is kept for the next save: on each
    rank as much as its part of the checkpoint. The checkpointer's group must be used by nobody else, since what the
    thread agrees on must not come between the collectives of the loop.

    A write that fails is raised, on all ranks, by the next `save` or `wait`. `failed` lets the loop know that it had
    better call one soon. In a ``with`` block, the end of the block waits too, so that nothing is lost.
    """

    def __init__(self, checkpointer: Checkpointer, asynchronous: bool, report: Callable[[str], None]) -> None:
        self._checkpointer = checkpointer
        self._asynchronous = asynchronous
        self._report = report
        self._memory: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a failed write. Others may not yet, so agree before acting on it."""
        return self._failure is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread writes."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, step: int, tensors: Callable[[], dict[str, Any]], extras: dict[str, Any], rank_state: dict[str, Any]
    ) -> None:
        """Collective. `Checkpointer.save`, now or beside the training, after the save before is committed.

        ``tensors`` makes the first argument of that; what it returns may share the memory of what is trained.
        """
        started = time.monotonic()
        if not self._asynchronous:
            self._checkpointer.save(step, tensors(), extras, rank_state)
            self._report(f"checkpoint of step {step} committed in {time.monotonic() - started:.1f} s")
            return
        self.wait()
        self._memory = self._checkpointer.ranks.each(
            lambda: stage({"tensors": tensors(), "extras": extras, "rank_state": rank_state}, self._memory)
        )
        held = time.monotonic() - started
        # A daemon: what the end of the block does not wait for must not keep the process alive.
        self._thread = threading.Thread(target=self._write, args=(step, held), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Collective. Until the save under way, if there is one, is committed; raises what it failed of."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None

        def outcome() -> None:
            if failure is not None:
                raise failure

        self._checkpointer.ranks.each(outcome)

    def _write(self, step: int, held: float) -> None:
        started = time.monotonic()
        try:
            self._checkpointer.save(step, **self._memory)
            seconds = time.monotonic() - started
            self._report(
                f"checkpoint of step {step} committed in {seconds:.1f} s beside the training, "
                f"which it held up for {held:.2f} s"
            )
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """After an error the ranks may have parted, so each only lets its thread come to an end and says how that
        failed. After KeyboardInterrupt it has a few seconds; then its folder stays behind, as after a kill."""
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(_IMPATIENCE if issubclass(kind, KeyboardInterrupt) else None)
            if self._failure is not None and self._checkpointer.ranks.rank == 0:
                log.warning("%s", self._failure)
