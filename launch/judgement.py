"""What is wrong, and where, in the readings of the health check: a function of them and of limits.

Devices of a kind are held against their median. A link that is slow is named by its two ends, or by the one of them
that is slow to both of its neighbours; of three slow in a row, the middle one may only stand between two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from launch.readings import BETWEEN, INSIDE, Host, Place, Reading


@dataclass(frozen=True)
class Limits:
    """``slow`` is a share of the median; free disk in bytes and the clocks' skew in seconds warn and fail."""

    slow: float = 0.8
    disk_warn: float = 10e9
    disk_fail: float = 1e9
    skew_warn: float = 1.0
    skew_fail: float = 30.0


@dataclass(frozen=True)
class Finding:
    """One line that says what is wrong where. Without ``fails`` it is a warning."""

    text: str
    fails: bool = True


def judge(readings: Sequence[Reading], limits: Limits) -> list[Finding]:
    """What is wrong in the readings of all ranks, in order of rank."""
    hosts = {one.place.host: one.host for one in readings if one.host is not None}
    on_gpu = {one.place.host for one in readings if one.place.index is not None}
    return [
        *_devices(readings, limits),
        *_gpu_memory(hosts, on_gpu),
        *_folder(readings),
        *_disks(hosts, limits),
        *_clocks(hosts, limits),
        *_sameness(readings, hosts),
        *_pairs(readings, limits),
        *_sums(readings),
    ]


def _devices(readings: Sequence[Reading], limits: Limits) -> Iterator[Finding]:
    kinds: dict[str, list[float]] = {}
    for one in readings:
        if one.flops is not None:
            kinds.setdefault(one.place.device, []).append(one.flops)
    for one in readings:
        name = one.place.name
        if one.error:
            yield Finding(f"{name}: {one.error}")
        if one.wrong_products:
            yield Finding(f"{name}: corrupts data: {one.wrong_products} elements of a known matrix product are wrong")
        if one.flops is None:
            continue
        middle = median(kinds[one.place.device])
        if one.flops < limits.slow * middle:
            rates = f"{_tera(one.flops)} of {_tera(middle)} TFLOP/s (limit {limits.slow:g} of the median)"
            yield Finding(f"{name}: matmul {rates}", fails=one.place.index is not None)


def _gpu_memory(hosts: dict[str, Host], on_gpu: set[str]) -> Iterator[Finding]:
    for name, host in hosts.items():
        if host.gpus_error:
            yield Finding(f"host {name}: {host.gpus_error}", fails=name in on_gpu)
        for gpu in host.gpus or []:
            for count, what in (
                (gpu.uncorrected, f"{gpu.uncorrected} uncorrected ECC errors since its driver was loaded"),
                (gpu.retirement, "memory pages wait to be retired: reset it"),
                (gpu.remapping, "memory rows wait to be remapped: reset it"),
                (gpu.failed_remapping, "a memory row could not be remapped: replace it"),
            ):
                if count == "Yes" or (count.isdecimal() and int(count) > 0):
                    yield Finding(f"host {name} GPU {gpu.index} ({gpu.uuid}): {what}")


def _folder(readings: Sequence[Reading]) -> Iterator[Finding]:
    by_host: dict[str, str] = {}
    unseen = {rank for one in readings for rank in one.unseen}
    for one in readings:
        if one.hidden:
            by_host.setdefault(one.place.host, one.hidden)
        elif one.place.rank in unseen:
            by_host.setdefault(
                one.place.host, f"rank 0 (host {readings[0].place.host}) does not see what it writes into the folder"
            )
    yield from (Finding(f"host {name}: {why}") for name, why in by_host.items())


def _disks(hosts: dict[str, Host], limits: Limits) -> Iterator[Finding]:
    for name, host in hosts.items():
        for where, free in (("the run's folder", host.folder_free), (host.temporary, host.temporary_free)):
            if free is not None and free < max(limits.disk_warn, limits.disk_fail):
                fails = free < limits.disk_fail
                limit = limits.disk_fail if fails else limits.disk_warn
                yield Finding(f"host {name}: {free / 1e9:.1f} GB free in {where} (limit {limit / 1e9:g} GB)", fails)


def _clocks(hosts: dict[str, Host], limits: Limits) -> Iterator[Finding]:
    first = next(iter(hosts), "")
    for name, host in hosts.items():
        if abs(host.skew) > min(limits.skew_warn, limits.skew_fail):
            fails = abs(host.skew) > limits.skew_fail
            limit = limits.skew_fail if fails else limits.skew_warn
            side = "ahead of" if host.skew > 0 else "behind"
            yield Finding(
                f"host {name}: its clock is {abs(host.skew):.1f} s {side} host {first}'s (limit {limit:g} s)", fails
            )


def _sameness(readings: Sequence[Reading], hosts: dict[str, Host]) -> Iterator[Finding]:
    devices: dict[str, list[str]] = {}
    for one in readings:
        devices.setdefault(one.place.host, []).append(one.place.device)
    for values in (
        {name: f"Python {host.python}" for name, host in hosts.items()},
        {name: f"torch {host.torch}" for name, host in hosts.items()},
        {name: f"code in {host.code}" for name, host in hosts.items()},
        {name: " + ".join(f"{n} × {kind}" for kind, n in Counter(kinds).items()) for name, kinds in devices.items()},
    ):
        ((usual, many), *_) = Counter(values.values()).most_common(1)
        for name, value in values.items():
            if value != usual:
                yield Finding(f"host {name}: {value}, but {usual} on {many} of {len(values)} hosts")


def _pairs(readings: Sequence[Reading], limits: Limits) -> Iterator[Finding]:
    places = {one.place.rank: one.place for one in readings}
    for one in readings:
        for met in one.exchanges:
            if met.wrong:
                names = f"{one.place.name}: received {met.wrong} wrong elements from {places[met.peer].name}"
                yield Finding(f"{names}: one of the two or their link corrupts data")
    for kind in (INSIDE, BETWEEN):
        rates: dict[int, dict[int, float]] = {}  # rank -> its peers -> what the slower of the two ends says
        for one in readings:
            for met in one.exchanges:
                if met.kind == kind:
                    for a, b in ((one.place.rank, met.peer), (met.peer, one.place.rank)):
                        known = rates.setdefault(a, {})
                        known[b] = min(met.rate, known.get(b, met.rate))
        if rates:
            yield from _slow_pairs(rates, places, limits)


def _slow_pairs(rates: dict[int, dict[int, float]], places: dict[int, Place], limits: Limits) -> Iterator[Finding]:
    # A slow rank slows the pairs of its neighbours too, so the yardstick is what ranks reach with the better one.
    middle = median(max(peers.values()) for peers in rates.values())
    limit = f"of {middle / 1e9:.3g} GB/s (limit {limits.slow:g} of the median)"
    slow = {
        rank: {peer for peer, rate in peers.items() if rate < limits.slow * middle} for rank, peers in rates.items()
    }
    blamed = {rank for rank, peers in rates.items() if len(peers) > 1 and len(slow[rank]) == len(peers)}
    for rank in sorted(rates):
        if rank in blamed:
            ends = " and with ".join(places[peer].name for peer in sorted(rates[rank]))
            best = max(rates[rank].values()) / 1e9
            fails = places[rank].index is not None
            yield Finding(f"{places[rank].name}: {best:.3g} {limit} with {ends}", fails)
        for peer in sorted(slow[rank] - blamed):
            if rank < peer and rank not in blamed:
                ends, rate = f"{places[rank].name} and {places[peer].name}", rates[rank][peer] / 1e9
                fails = places[rank].index is not None and places[peer].index is not None
                yield Finding(f"{ends}: {rate:.3g} {limit} between them", fails)


def _sums(readings: Sequence[Reading]) -> Iterator[Finding]:
    wrong = [one for one in readings if one.wrong_sums]
    if len(wrong) == len(readings):
        yield Finding(f"all ranks: {wrong[0].wrong_sums} wrong elements in a sum over all: a device corrupts data")
    else:
        for one in wrong:
            yield Finding(f"{one.place.name}: {one.wrong_sums} wrong elements in a sum over all ranks")


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}"
