"""Work that all ranks do together and that fails on all of them if it fails on one."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from models.errors import ConfigError

T = TypeVar("T")


class Ranks:
    """The ranks of one gloo group, or the only process there is (``group`` None).

    Every method is collective: all ranks call it in the same order. Results travel as pickles, so they are small
    and plain. A rank waits for the slowest one, hence the group's timeout must exceed the longest piece of work.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        assert group is not None or alone, "several ranks need a group to agree in"
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def together(self, work: Callable[[], T]) -> list[T]:
        """``work()`` of every rank, in order of rank.

        If it raises anywhere, every rank raises the same error: the ConfigError or OSError itself, and for anything
        else a RuntimeError with the traceback of the rank it happened on.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except (Exception, CheckpointException) as raised:  # DCP's own derives from BaseException
            error = _portable(raised, self.rank)
        outcomes = [(result, error)]
        if self.group is not None:
            outcomes = [(None, None)] * self.size
            dist.all_gather_object(outcomes, (result, error), group=self.group)
        errors = [failed for _, failed in outcomes if failed is not None]
        if errors:  # an internal error is often the echo of a plain one on another rank, so plain ones go first
            worst = next((e for e in errors if isinstance(e, ConfigError | OSError)), errors[0])
            if isinstance(worst, ConfigError):
                worst.agreed = True
            raise worst
        return [cast(T, done) for done, _ in outcomes]

    def each(self, work: Callable[[], T]) -> T:
        """This rank's own ``work()``, which stays here and may be large; errors as in `together`."""
        results: list[T] = []
        self.together(lambda: results.append(work()))
        return results[0]

    def first(self, work: Callable[[], T]) -> T:
        """``work()`` of rank 0 alone, given to every rank; errors as in `together`."""
        return cast(T, self.together(lambda: work() if self.rank == 0 else None)[0])


def _portable(error: BaseException, rank: int) -> Exception:
    """The error in a form that survives pickling with all it has to say."""
    text = "".join(traceback.format_exception(error))
    if isinstance(error, CheckpointException):  # what DCP gathered: one exception for each rank that failed
        causes = [cause for cause, _ in error.failures.values()]
        error = next((cause for cause in causes if isinstance(cause, ConfigError | OSError)), error)
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    return RuntimeError(f"on rank {rank}: {text}")
