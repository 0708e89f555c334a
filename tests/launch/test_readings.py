"""What the health check reads, with faults put in: a wrong bit, a clock that is ahead.

GPUs are not here: what differs on them (events, bf16, NCCL's pairs) is not run by these tests.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import readings
from launch.readings import BETWEEN, INSIDE, Exchange, Place, Reading, known_product, pair_rounds
from pretrain.distributed import World
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7))
def test_everyone_meets_the_neighbours_of_both_rings_once_and_one_at_a_time(devices: list[int]) -> None:
    on = [(host, index) for host, count in enumerate(devices) for index in range(count)]
    here = [Place(rank, f"n{host}", "H100", index) for rank, (host, index) in enumerate(on)]
    rounds = pair_rounds(here)
    assert len(rounds) <= 6, "however many hosts there are"
    for _, pairs in rounds:
        assert max(Counter(rank for pair in pairs for rank in pair).values()) == 1
    met = Counter((kind, frozenset(pair)) for kind, pairs in rounds for pair in pairs)
    assert set(met.values()) <= {1}
    rings = {INSIDE: lambda place: place.host, BETWEEN: lambda place: place.index}
    for kind, ring_of in rings.items():
        sizes = Counter(ring_of(place) for place in here)
        degree = Counter(rank for (k, pair) in met if k == kind for rank in pair)
        assert {p.rank: degree[p.rank] for p in here} == {p.rank: min(2, sizes[ring_of(p)] - 1) for p in here}
        assert all(len({ring_of(here[rank]) for rank in pair}) == 1 for k, pair in met if k == kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_known_product_is_the_product(dtype: torch.dtype) -> None:
    left, right, expected = known_product(256, dtype, CPU)
    assert torch.equal(left.double() @ right.double(), expected.double())
    assert {left.abs().unique().numel(), right.abs().unique().numel()} == {7}, "1, 3, 5, 7, 9, 15, 21"


def test_the_known_product_is_exact_in_bf16_at_the_size_for_gpus() -> None:
    values = torch.tensor([21.0, 63.0, 189.0], dtype=torch.float64) * 8192
    assert torch.equal(values.to(torch.bfloat16).double(), values)
    assert 21 * 9 * 8192 < 2**21  # the sum of absolute values, which no partial sum exceeds: exact in fp32's 2^24


def test_a_wrong_product_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = torch.Tensor.__matmul__
    reading = Reading(Place(0, "n1", "cpu"))
    readings.read_device(reading, CPU)
    assert (reading.wrong_products, reading.error) == (0, "")
    assert reading.flops is not None

    def broken(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = multiply(left, right)
        product.view(torch.int32)[3, 4] ^= 1  # the lowest bit of one element
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    readings.read_device(reading, CPU)
    assert reading.wrong_products == 1


def network(fault: str) -> tuple[float, Exchange, Reading]:
    """What this rank reads of the network when rank 1 has the fault."""
    world = World(dist.get_rank(), 2, CPU, dist.new_group(backend="gloo"))
    send, reduce = dist.send, dist.all_reduce
    if world.rank == 1 and fault == "clock":
        readings.time = SimpleNamespace(time=lambda: time.time() + 5, perf_counter=time.perf_counter)  # type: ignore
    if world.rank == 1 and fault == "send":

        def broken(tensor: torch.Tensor, *to: int) -> None:
            sent = tensor.clone()
            sent[100] ^= 1 << 20
            send(sent, *to)

        dist.send = broken
    if world.rank == 1 and fault in ("before the sum", "after the sum"):

        def wrong(tensor: torch.Tensor) -> None:
            order: list[Callable[[], object]] = [lambda: tensor[7:10].add_(1), lambda: reduce(tensor)]
            for work in order if fault == "before the sum" else reversed(order):
                work()

        dist.all_reduce = wrong
    skew = readings.read_skew(world, [0, 1]) if fault in ("", "clock") else 0.0
    met = readings.exchange(world, INSIDE, 1 - world.rank)
    assert met is not None
    reading = Reading(Place(world.rank, "n1", "cpu"))
    readings.read_all_reduce(reading, world)
    dist.send, dist.all_reduce = send, reduce
    return skew, met, reading


@pytest.mark.parametrize(
    ("fault", "skew", "received", "sums"),
    [
        ("", 0, (0, 0), (0, 0)),
        ("clock", 5, (0, 0), (0, 0)),
        ("send", 0, (1, 0), (0, 0)),
        ("before the sum", 0, (0, 0), (3, 3)),
        ("after the sum", 0, (0, 0), (0, 3)),
    ],
)
def test_faults_of_rank_1_show_in_the_readings(
    fault: str, skew: float, received: tuple[int, int], sums: tuple[int, int]
) -> None:
    (_, met0, read0), (skew1, met1, read1) = run_ranks(network, 2, fault)
    assert skew1 == pytest.approx(skew, abs=0.2)  # half a round trip on this machine, which may be busy
    assert (met0.wrong, met1.wrong) == received
    assert (read0.wrong_sums, read1.wrong_sums) == sums
    assert min(met0.rate, met1.rate, read0.all_reduce or 0, read1.all_reduce or 0) > 0
