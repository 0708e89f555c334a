"""One rank's failure is everyone's, and the helper that starts ranks says which it was."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from typing import Any

import pytest
import torch.distributed as dist

from models.errors import ConfigError
from pretrain.agreement import Ranks
from tests.ranks import RankError, run_ranks


def gather_and_choose(offset: int) -> tuple[list[int], int, str]:
    ranks = Ranks(dist.group.WORLD)
    return ranks.together(lambda: ranks.rank + offset), ranks.each(lambda: -ranks.rank), ranks.first(lambda: "zero")


def test_results_in_order_of_rank() -> None:
    assert run_ranks(gather_and_choose, 3, 7) == [([7, 8, 9], -rank, "zero") for rank in range(3)]


def errors_of_ranks() -> list[tuple[str, str, Any]]:
    """What each rank sees when one or two fail; the second piece of work shows that they are still in step."""
    ranks = Ranks(dist.group.WORLD)
    failures: list[dict[int, Exception]] = [
        {1: ConfigError("wrong key")},
        {1: OSError(errno.ENOSPC, "No space left on device", "/a/file")},
        {0: ZeroDivisionError("a bug")},
        {0: RuntimeError("an echo"), 1: PermissionError(errno.EACCES, "Permission denied", "/a/file")},
    ]
    seen = []
    for by_rank in failures:

        def work(by_rank: dict[int, Exception] = by_rank) -> None:
            if ranks.rank in by_rank:
                raise by_rank[ranks.rank]

        try:
            ranks.each(work)
        except (ConfigError, OSError, RuntimeError) as error:
            seen.append((type(error).__name__, str(error), getattr(error, "errno", None)))
        assert ranks.together(lambda: ranks.rank) == [0, 1]
    return seen


def test_errors_are_the_same_on_all_ranks() -> None:
    first, second = run_ranks(errors_of_ranks, 2)
    assert first == second
    assert first[0] == ("ConfigError", "wrong key", None)
    assert first[1] == ("OSError", "[Errno 28] No space left on device: '/a/file'", errno.ENOSPC)
    assert first[2][0] == "RuntimeError"
    assert "on rank 0: Traceback" in first[2][1]
    assert "ZeroDivisionError: a bug" in first[2][1]
    assert first[3] == ("PermissionError", "[Errno 13] Permission denied: '/a/file'", errno.EACCES)


def test_alone() -> None:
    ranks = Ranks(None)
    assert (ranks.together(lambda: 5), ranks.each(lambda: 6), ranks.first(lambda: 7)) == ([5], 6, 7)
    with pytest.raises(ConfigError, match="wrong"):
        ranks.first(lambda: (_ for _ in ()).throw(ConfigError("wrong")))


def misbehave(how: str) -> int:
    dist.barrier()  # who leaves while others still connect takes their connections along
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("the culprit")
        if how == "exit":
            os._exit(3)
        time.sleep(600)
    return dist.get_rank()


@pytest.mark.parametrize(
    ("how", "outcome"), [("raise", "ValueError: the culprit"), ("exit", "died"), ("hang", "did not finish in time")]
)
def test_run_ranks_names_the_culprit_and_leaves_no_process(how: str, outcome: str) -> None:
    before = multiprocessing.active_children()  # a fixture may keep one for the whole session
    with pytest.raises(RankError) as error:
        run_ranks(misbehave, 2, how, timeout=2)
    assert outcome in error.value.outcomes[1]
    assert error.value.outcomes[0] == "finished"
    assert set(multiprocessing.active_children()) <= set(before)
