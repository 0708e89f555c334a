"""The health check's judgement, on readings of healthy hosts with one fault put in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.judgement import Finding, Limits, judge
from launch.readings import BETWEEN, INSIDE, Exchange, Host, Place, Reading, pair_rounds, parse_gpus

RATES = {INSIDE: 400e9, BETWEEN: 45e9}


def places(*devices: int, kind: str = "H100") -> list[Place]:
    """Hosts n1, n2, ... with so many devices each."""
    on = [(host, index) for host, count in enumerate(devices, 1) for index in range(count)]
    return [Place(rank, f"n{host}", kind, None if kind == "cpu" else i) for rank, (host, i) in enumerate(on)]


def sound(*devices: int, kind: str = "H100") -> list[Reading]:
    """What healthy hosts read: rates differ by a few percent."""
    found = [Reading(place, flops=780e12 * (1 - place.rank % 5 / 100)) for place in places(*devices, kind=kind)]
    for one in found:
        one.all_reduce = 300e9
        if not any(other.place.host == one.place.host for other in found[: one.place.rank]):
            one.host = Host("3.12.3", "2.13.0", "/code", "/scratch", 500_000_000_000, 900_000_000_000, None)
    for kind_of_pair, pairs in pair_rounds([one.place for one in found]):
        for a, b in pairs:
            rate = RATES[kind_of_pair] * (1 - (a + b) % 5 / 100)
            found[a].exchanges.append(Exchange(kind_of_pair, b, rate, 0))
            found[b].exchanges.append(Exchange(kind_of_pair, a, rate, 0))
    return found


def slow_down(found: list[Reading], kind: str, factor: float, hit: Callable[[int, int], bool]) -> None:
    for one in found:
        one.exchanges = [
            replace(met, rate=met.rate * factor) if met.kind == kind and hit(one.place.rank, met.peer) else met
            for met in one.exchanges
        ]


def texts(found: list[Reading], limits: Limits = Limits()) -> list[str]:  # noqa: B008
    findings = judge(found, limits)
    assert all(finding.fails for finding in findings)
    return [finding.text for finding in findings]


@pytest.mark.parametrize("devices", [(1,), (8,), (1, 1), (8, 8), (2, 2, 2), (8,) * 5])
def test_nothing_is_wrong_with_the_healthy(devices: tuple[int, ...]) -> None:
    assert judge(sound(*devices), Limits()) == []


def test_a_slow_device_is_named() -> None:
    found = sound(8, 8)
    for one in found:
        one.flops = 780e12
    found[11].flops = 612e12
    assert texts(found) == ["host n2 device 3: matmul 612 of 780 TFLOP/s (limit 0.8 of the median)"]
    assert texts(found, Limits(slow=0.78)) == []


def test_devices_are_held_against_their_own_kind() -> None:
    """A slower kind is no slow device; that hosts differ is a finding of its own."""
    found = sound(2, 2, 2)
    for one in found[4:]:
        one.place, one.flops = replace(one.place, device="A100"), 280e12
    assert texts(found) == ["host n3: 2 × A100, but 2 × H100 on 2 of 3 hosts"]


def test_slowness_of_a_cpu_is_a_warning() -> None:
    found = sound(1, 1, 1, 1, kind="cpu")
    found[1].flops = 1e9
    slow_down(found, BETWEEN, 0.1, lambda a, b: 2 in (a, b))
    findings = judge(found, Limits())
    assert [finding.text.split(":")[0] for finding in findings] == ["host n2 rank 1", "host n3 rank 2"]
    assert not any(finding.fails for finding in findings)


def test_corrupted_data_is_named() -> None:
    found = sound(2, 2)
    found[3].wrong_products = 1
    assert texts(found) == ["host n2 device 1: corrupts data: 1 elements of a known matrix product are wrong"]
    found = sound(2, 2)
    found[1].exchanges[0] = replace(found[1].exchanges[0], wrong=7)
    assert texts(found) == [
        "host n1 device 1: received 7 wrong elements from host n1 device 0: one of the two or their link corrupts data"
    ]
    found = sound(2, 2)
    found[2].wrong_sums = 5
    assert texts(found) == ["host n2 device 0: 5 wrong elements in a sum over all ranks"]
    for one in found:
        one.wrong_sums = 5
    assert texts(found) == ["all ranks: 5 wrong elements in a sum over all: a device corrupts data"]


def test_a_device_that_raises_is_named() -> None:
    found = sound(2, 2)
    found[2].error, found[2].flops = "AcceleratorError: CUDA error: uncorrectable ECC error encountered", None
    assert texts(found) == ["host n2 device 0: AcceleratorError: CUDA error: uncorrectable ECC error encountered"]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_who_is_slow_to_both_neighbours_is_named_and_nobody_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([INSIDE, BETWEEN]))
    # At least three around the ring: of two, which one is slow cannot be known.
    hosts, devices = data.draw(st.tuples(st.integers(3, 6), st.integers(3, 5)))
    found = sound(*[devices] * hosts)
    slow = data.draw(st.integers(0, len(found) - 1))
    slow_down(found, kind, 0.3, lambda a, b: slow in (a, b))
    [text] = texts(found)
    assert text.split(":")[0] == found[slow].place.name


def test_a_slow_link_is_named_by_its_ends() -> None:
    found = sound(4, 4, 4, 4)
    slow_down(found, BETWEEN, 0.5, lambda a, b: {a, b} == {5, 9})
    [text] = texts(found)
    assert text.startswith("host n2 device 1 and host n3 device 1: 21.6 of 44.5 GB/s (limit 0.8 of the median)")


def test_of_two_hosts_a_slow_rail_is_named_by_its_ends() -> None:
    found = sound(8, 8)
    slow_down(found, BETWEEN, 0.3, lambda a, b: {a, b} == {3, 11})
    [text] = texts(found)
    assert text.startswith("host n1 device 3 and host n2 device 3: ")


def test_a_host_that_is_slow_on_all_rails_is_named_though_most_pairs_are_slow() -> None:
    found = sound(8, 8, 8)
    slow_down(found, BETWEEN, 0.3, lambda a, b: a // 8 == 1 or b // 8 == 1)
    assert [text.split(":")[0] for text in texts(found)] == [f"host n2 device {i}" for i in range(8)]


def test_memory_errors_are_named_and_what_is_not_supported_is_fine() -> None:
    listed = "0, GPU-a, 0, No\n1, GPU-b, 3, [N/A]\n2, GPU-c, [N/A], [N/A]\n3, GPU-d, 0, Yes\n4, GPU-e, 0, No\n"
    rows = "GPU-b, 0, 0\nGPU-c, [N/A], [Not Supported]\nGPU-e, 1, Yes\n"
    found = sound(8, 8)
    assert found[8].host is not None
    found[8].host = replace(found[8].host, gpus=parse_gpus(listed, rows))
    assert texts(found) == [
        "host n2 GPU 1 (GPU-b): 3 uncorrected ECC errors since its driver was loaded",
        "host n2 GPU 3 (GPU-d): memory pages wait to be retired: reset it",
        "host n2 GPU 4 (GPU-e): memory rows wait to be remapped: reset it",
        "host n2 GPU 4 (GPU-e): a memory row could not be remapped: replace it",
    ]


@pytest.mark.parametrize(("kind", "fails"), [("H100", True), ("cpu", False)])
def test_nvidia_smi_must_answer_where_gpus_are_used(kind: str, fails: bool) -> None:
    found = sound(1, 1, kind=kind)
    assert found[1].host is not None
    found[1].host = replace(found[1].host, gpus_error="nvidia-smi failed: GPU is lost")
    assert judge(found, Limits()) == [Finding("host n2: nvidia-smi failed: GPU is lost", fails)]


def test_a_host_that_does_not_share_the_folder_is_named_once() -> None:
    found = sound(2, 2, 2)
    found[2].hidden = found[3].hidden = "does not see what rank 0 wrote"
    found[0].unseen = [4, 5]
    assert texts(found) == [
        "host n2: does not see what rank 0 wrote",
        "host n3: rank 0 (host n1) does not see what it writes into the folder",
    ]


@pytest.mark.parametrize(("free", "fails"), [(11e9, None), (9e9, False), (0.9e9, True)])
def test_little_free_disk_is_named(free: float, fails: bool | None) -> None:
    found = sound(1, 1)
    assert found[1].host is not None
    limit = {False: "10", True: "1", None: ""}[fails]
    for field, where in (("folder_free", "the run's folder"), ("temporary_free", "/scratch")):
        changed = found[1].host if free is None else replace(found[1].host, **{field: int(free)})
        text = f"host n2: {free / 1e9:.1f} GB free in {where} (limit {limit} GB)"
        expected = [] if fails is None else [Finding(text, fails)]
        assert judge([found[0], replace(found[1], host=changed)], Limits()) == expected


@pytest.mark.parametrize(("skew", "fails"), [(0.9, None), (-0.9, None), (2.0, False), (-40.0, True), (40.0, True)])
def test_a_skewed_clock_is_named(skew: float, fails: bool | None) -> None:
    found = sound(1, 1)
    assert found[1].host is not None
    found[1].host = replace(found[1].host, skew=skew)
    side, limit = "ahead of" if skew > 0 else "behind", "30" if fails else "1"
    text = f"host n2: its clock is {abs(skew):.1f} s {side} host n1's (limit {limit} s)"
    assert judge(found, Limits()) == ([] if fails is None else [Finding(text, fails)])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"python": "3.11.9"}, "Python 3.11.9, but Python 3.12.3"),
        ({"torch": "2.12.0"}, "torch 2.12.0, but torch 2.13.0"),
        ({"code": "/old"}, "code in /old, but code in /code"),
    ],
)
def test_a_host_with_other_versions_is_named(change: dict[str, str], text: str) -> None:
    found = sound(2, 2, 2)
    assert found[0].host is not None
    found[0].host = replace(found[0].host, **change)
    assert texts(found) == [f"host n1: {text} on 2 of 3 hosts"]


def test_a_host_with_fewer_devices_is_named() -> None:
    assert texts(sound(4, 4, 3)) == ["host n3: 3 × H100, but 4 × H100 on 2 of 3 hosts"]
