"""A stop is all ranks' or none's, at the same step; signals are borrowed and given back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from pretrain.control import SIGNALS, StopRequest
from pretrain.distributed import World
from tests.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = [signal.getsignal(number) for number in SIGNALS]
    request = StopRequest(ALONE)
    try:
        yield request
    finally:
        request.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before, "the signals are given back"


@pytest.mark.parametrize("number", SIGNALS)
def test_alone(stop: StopRequest, number: signal.Signals) -> None:
    assert not stop.agreed()
    signal.raise_signal(number)
    assert stop.agreed()
    assert stop.agreed(), "a request stays"


def test_a_second_interrupt_is_taken_at_its_word(stop: StopRequest) -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # a scheduler repeats itself
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.agreed()


def test_the_first_interrupt_is_polite(stop: StopRequest) -> None:
    signal.raise_signal(signal.SIGINT)
    assert stop.agreed()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def stopped_at(number: signal.Signals, struck: int, when: int) -> tuple[int, int]:
    """The step before which this rank stopped, 99 if never, and how many collectives it took part in until then.

    Rank ``struck`` gets the signal in step ``when``; ranks are slow in turn, so that none keeps pace with another.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    stop = StopRequest(World(rank, size, torch.device("cpu"), dist.new_group(backend="gloo")))
    shared = torch.zeros(1)
    try:
        for step in range(20):
            if stop.agreed():
                return step, int(shared.item())
            if (step + rank) % size == 0:
                time.sleep(0.003)
            if step == when and rank == struck:
                os.kill(os.getpid(), number)
            shared.fill_(1.0)
            dist.all_reduce(shared)  # the step's own collective: ranks that part here hang or raise
            assert shared.item() == size
            shared.fill_(step + 1)
        return 99, int(shared.item())
    finally:
        stop.close()


@pytest.mark.parametrize(
    ("number", "world_size", "struck", "when"),
    [(signal.SIGTERM, 2, 1, 5), (signal.SIGUSR1, 3, 2, 0), (signal.SIGINT, 3, 0, 7)],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number: signal.Signals, world_size: int, struck: int, when: int
) -> None:
    # Raised in step k, sent with k + 1's all-reduce, read before k + 2.
    assert run_ranks(stopped_at, world_size, number, struck, when) == [(when + 2, when + 2)] * world_size


def failed_at(struck: int, when: int) -> int:
    """The step before which this rank stopped after work beside rank ``struck``'s loop failed in step ``when``."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, torch.device("cpu"), dist.new_group(backend="gloo") if size > 1 else None)
    now = 0
    stop = StopRequest(world, failed=lambda: rank == struck and now > when)
    try:
        while now < 20 and not stop.agreed():
            now += 1
        return now
    finally:
        stop.close()


@pytest.mark.parametrize(("world_size", "struck"), [(1, 0), (3, 2)])
def test_a_failure_that_one_rank_knows_of_stops_all_at_the_same_step(world_size: int, struck: int) -> None:
    # As above; alone, nothing has to be sent first.
    assert run_ranks(failed_at, world_size, struck, 5) == [6 if world_size == 1 else 7] * world_size


def test_without_a_signal_nobody_stops() -> None:
    assert run_ranks(stopped_at, 2, signal.SIGTERM, 0, 1000) == [(99, 20)] * 2
