"""Rates by a clock that the test turns."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from models.config import ModelConfig
from pretrain.config import DataConfig, RunConfig, TrainConfig
from pretrain.counts import derive_counts
from pretrain.distributed import World
from pretrain.telemetry import Throughput, memory_gb, throughput
from tests.runs import REPOSITORY

PEAK = 1e9


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "device_peak", lambda device, compute: PEAK)
    return clock


def meter(world: World) -> Throughput:
    """Of 100 tokens a step, 6 x 50 + 12 x 2 x 8 x 10 = 2220 FLOPs each."""
    config = RunConfig(
        model=ModelConfig(width=8, depth=2, heads=2, context=10),
        data=DataConfig(sequence_length=10),
        train=TrainConfig(steps=99, batch_tokens=100, micro_batch=1),
    )
    return Throughput(config, world, derive_counts(config, world.size), matmul_parameters=50)


def test_rates_since_the_last_read_without_pauses(clock: Clock) -> None:
    rates = meter(World(0, 1, torch.device("cpu")))
    clock.now += 50  # building, before the first step
    rates.start(step=7)
    clock.now += 1.0
    rates.waited(0.25)
    with rates.paused():
        clock.now += 30  # a validation
    clock.now += 3.0
    rates.waited(0.75)
    assert rates.read(step=15) == {
        "tokens_per_second": pytest.approx(8 * 100 / 4.0),
        "mfu": pytest.approx(200 * 2220 / PEAK),
        "data_share": pytest.approx(1.0 / 4.0),
    }
    clock.now += 2.0
    second = rates.read(step=16)  # nothing of before counts again
    assert (second["tokens_per_second"], second["data_share"]) == (pytest.approx(50.0), 0.0)


def test_a_pause_just_before_a_read_counts_in_neither(clock: Clock) -> None:
    rates = meter(World(0, 1, torch.device("cpu")))
    rates.start(0)
    clock.now += 2.0
    with rates.paused():
        clock.now += 100
    assert rates.read(1)["tokens_per_second"] == pytest.approx(50.0)
    with rates.paused():
        clock.now += 100
    clock.now += 4.0
    assert rates.read(2)["tokens_per_second"] == pytest.approx(25.0)


@pytest.mark.parametrize(("device", "devices"), [("cpu", 1), ("cuda", 5)])
def test_ranks_on_one_processor_share_its_peak(clock: Clock, device: str, devices: int) -> None:
    rates = meter(World(0, 5, torch.device(device)))
    rates.start(0)
    clock.now += 1.0
    found = rates.read(10)
    assert found["tokens_per_second"] == pytest.approx(1000.0), "of all ranks together"
    assert found["mfu"] == pytest.approx(1000 * 2220 / (devices * PEAK))


def test_an_unknown_peak_has_no_mfu(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "device_peak", lambda device, compute: None)
    rates = meter(World(0, 1, torch.device("cpu")))
    rates.start(0)
    clock.now += 1.0
    assert rates.read(1)["mfu"] is None


def test_a_clock_that_stands_still_divides_by_nothing(clock: Clock) -> None:
    rates = meter(World(0, 1, torch.device("cpu")))
    rates.start(0)
    assert rates.read(0) == {"tokens_per_second": 0.0, "mfu": 0.0, "data_share": 0.0}


def test_reading_before_the_start_is_a_bug(clock: Clock) -> None:
    with pytest.raises(AssertionError, match="start"):
        meter(World(0, 1, torch.device("cpu"))).read(1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps ru_maxrss across exec")
def test_memory_is_this_process_s_own() -> None:
    """A process of less than a gigabyte, started by one that holds it, has not had a gigabyte."""
    held = bytearray(10**9)
    held[::4096] = bytes(len(held[::4096]))  # resident, not only promised
    program = (
        "import resource; from pretrain.telemetry.throughput import peak_resident_bytes as peak;"
        "print(peak(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024);"
        "held = bytearray(300_000_000); held[::4096] = bytes(len(held[::4096])); print(peak())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    (first, kernel), (later,) = (list(map(int, line.split())) for line in done.stdout.splitlines())
    assert kernel > 10**9  # the trap is there
    assert 1e7 < first < 10**9
    assert 250_000_000 < later - first < 310_000_000  # importing torch had its own peak


def test_memory_units_of_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(ru_maxrss=3_000_000_000)
    monkeypatch.setattr(throughput.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory_gb(torch.device("cpu")) == 3.0
