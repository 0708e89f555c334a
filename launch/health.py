"""Whether all hosts and devices are fit for a run, before its first step: as many processes as the run will have.

    python -m launch health runs/NAME                                         alone
    torchrun ... -m launch health runs/NAME --json health.json                on all its nodes

Every rank multiplies matrices and exchanges data with its neighbours in two rings, within its host and between hosts,
and all sum a tensor together; times are held against the median and results against their known values. Each host is
asked for its GPUs' memory errors (nvidia-smi), free disk, its clock and its versions, and shows that it shares the
run's folder. On CPUs, which others may be using, slowness is a warning only. Quotas are not seen: free disk is what
the file system says. GPUs of another maker are not asked for memory errors.

Exit code 0: healthy; 1: not, or not all ranks came to the end in --timeout seconds; 2: a mistake in what was given. All
ranks end alike.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from launch import readings as read
from launch.judgement import Finding, Limits, judge
from launch.readings import BETWEEN, INSIDE, Reading
from models.errors import ConfigError
from pretrain.agreement import Ranks
from pretrain.arguments import Parser
from pretrain.distributed import World, joined
from pretrain.files import write_atomically
from pretrain.rank import rank_in_environment
from pretrain.watchdog import one_line

T = TypeVar("T")

_TIMEOUT = 300.0  # seconds for everything; the check itself takes some ten
_EARLIER = 0.1  # of the time: how long before its end rank 0 stops waiting, to say whom it waited for
_PRESENT = 1  # the tag by which ranks say so


class Unhealthy(Exception):
    """Ends the check. ``findings``: what this rank has to say of it; all others have nothing."""

    def __init__(self, *findings: str) -> None:
        self.findings = findings


class Deadline:
    """Ends the process when the time is up, whatever hangs: a collective, a driver, a file system."""

    def __init__(self, seconds: float) -> None:
        self.line = f"host {socket.gethostname()} rank {rank_in_environment()}: not all other ranks came"
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def remaining(self) -> float:
        return self._end - time.monotonic()

    def shorten(self, remaining: float) -> None:
        """To so many seconds from now on, which are the same on all ranks."""
        self._end = time.monotonic() + remaining

    def patience(self) -> timedelta:
        """How long rank 0 waits for others from now on."""
        return timedelta(seconds=max(0.1, self.remaining() - _EARLIER * self._seconds))

    def lift(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while self.remaining() > 0:
            if self._over.wait(self.remaining()):
                return
        if self.line:
            _say(f"unhealthy: {self.line} within {self._seconds:g} s")
        os._exit(1)


class Phases:
    """The parts of the check, which all ranks go through together."""

    def __init__(self, world: World, deadline: Deadline) -> None:
        self.world = world
        self.ranks = Ranks(world.control)
        self._deadline = deadline
        self._what = ""
        deadline.shorten(min(self.ranks.together(deadline.remaining)))
        self.places = self.ranks.together(lambda: read.place_of(world))
        self.leads = [ranks[0] for ranks in read.hosts_of(self.places).values()]

    def begin(self, what: str) -> None:
        self._what = what
        if self.world.is_main:
            _say(f"health: {what}, {self.world.size} ranks on {len(self.leads)} hosts")

    def each(self, work: Callable[[], T], peers: Mapping[int, int] | None = None, everyone: bool = False) -> list[T]:
        """The results of all ranks. If some do not get there, rank 0 names them, or they themselves what they wait for.

        ``peers``: who works with whom. ``everyone``: all work together, so that nobody in particular hangs.
        """
        if everyone:
            self._deadline.line = f"all ranks: {self._what} did not end" if self.world.is_main else ""
        else:
            self._deadline.line = f"{self._part(self.world.rank, peers)} did not end"
        result, failed = None, ""
        try:
            result = work()
        except (RuntimeError, OSError) as error:
            failed = f"{self._part(self.world.rank, peers)}: {one_line(error)}"
        self._deadline.line = f"{self.places[0].name}: {self._what} did not end"
        try:
            missing = self._missing()
            outcomes = [] if missing else self.ranks.together(lambda: (result, failed))
        except RuntimeError as error:  # rank 0 has found that some are missing, or is gone, which the launcher says
            raise Unhealthy(*[failed] if failed else ()) from error
        if missing:
            lines = [f"{self._part(rank, peers)}: it hangs, or its process ended" for rank in missing]
            raise Unhealthy(*[failed] if failed else (), *lines)
        if failures := [failed for _, failed in outcomes if failed]:
            raise Unhealthy(*failures if self.world.is_main else ())
        return [cast(T, result) for result, _ in outcomes]

    def _part(self, rank: int, peers: Mapping[int, int] | None) -> str:
        """Of the rank, in this phase."""
        partner = f" with {self.places[peers[rank]].name}" if peers and rank in peers else ""
        return f"{self.places[rank].name}: {self._what}{partner}"

    def _missing(self) -> list[int]:
        """On rank 0, who does not come to this point in time: torch's monitored_barrier does not name the dead."""
        if self.world.control is None:
            return []
        word = torch.zeros(1)
        if not self.world.is_main:
            dist.send(word, 0, group=self.world.control, tag=_PRESENT)
            return []
        words: dict[int, dist.Work | None] = {}
        for rank in range(1, self.world.size):  # all at once: gloo closes the others once one is late
            with suppress(RuntimeError):
                words[rank] = dist.irecv(torch.zeros(1), rank, group=self.world.control, tag=_PRESENT)
        here = set()
        for rank, work in words.items():
            with suppress(RuntimeError):
                assert work is not None, "rank 0 is in the group"
                work.wait(self._deadline.patience())
                here.add(rank)
        return [rank for rank in range(1, self.world.size) if rank not in here]


def check(world: World, folder: Path, deadline: Deadline) -> list[Reading]:
    """The readings of all ranks, on every rank. Devices that fail alone are not asked to work together."""
    phases = Phases(world, deadline)
    rank, main = world.rank, world.is_main
    mine = Reading(phases.places[rank])

    phases.begin("matrix products")
    phases.each(lambda: read.read_device(mine, world.device))

    phases.begin("the run's folder")
    token = folder / phases.each(read.token_name)[0]
    unwritten = phases.each(lambda: read.show(token, 0) if main else "")[0]
    if unwritten:
        mine.hidden = unwritten if main else ""
    else:
        hidden = phases.each(lambda: read.look(token, rank))
        wrote = [other for other, why in enumerate(hidden) if not why]
        mine.hidden = hidden[rank]
        mine.unseen = phases.each(lambda: read.unseen(token, wrote) if main else [])[rank]

    phases.begin("disks, memory errors and clocks")
    host = phases.each(lambda: read.read_host(folder) if rank in phases.leads else None)[rank]
    skew = phases.each(lambda: read.read_skew(world, phases.leads))[rank]
    mine.host = host and replace(host, skew=skew)

    if not any(phases.each(lambda: mine.error)):
        phases.begin("exchanges")
        for kind, pairs in read.pair_rounds(phases.places):
            peers = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
            met = phases.each(partial(read.exchange, world, kind, peers.get(rank)), peers)[rank]
            mine.exchanges += [met] if met else []
        phases.begin("a sum over all ranks")
        phases.each(lambda: read.read_all_reduce(mine, world), everyone=True)
    return phases.each(lambda: mine)


def table(readings: Sequence[Reading]) -> Table:
    """A line for each host."""
    lines = Table(box=None, pad_edge=False)
    for name in ("host", "ranks", "devices", "TFLOP/s min", "median", f"GB/s {INSIDE}", BETWEEN, "GB free", "skew, s"):
        lines.add_column(name, justify="left" if name in ("host", "devices") else "right", no_wrap=True)
    ranks = {one.place.rank: one for one in readings}
    for name, members in read.hosts_of(one.place for one in readings).items():
        ours = [ranks[rank] for rank in members]
        flops = [one.flops for one in ours if one.flops is not None]
        met = [one for each in ours for one in each.exchanges]
        host = ours[0].host
        assert host is not None, "the first rank of a host speaks for it"
        lines.add_row(
            name,
            f"{len(ours)}",
            " + ".join(sorted({one.place.device for one in ours})),
            _figure(flops, 1e12),
            _figure([median(flops)] if flops else [], 1e12),
            *(_figure([one.rate for one in met if one.kind == kind], 1e9) for kind in (INSIDE, BETWEEN)),
            _figure([free for free in (host.folder_free, host.temporary_free) if free is not None], 1e9),
            f"{host.skew:.3f}",
        )
    return lines


def _figure(values: Sequence[float], unit: float) -> str:
    """The least of them."""
    return f"{min(values) / unit:.3g}" if values else "-"


def notes(readings: Sequence[Reading]) -> list[str]:
    """What else is to be said below the table."""
    lines = []
    if rates := [one.all_reduce for one in readings if one.all_reduce is not None]:
        lines.append(f"a sum over all ranks: {min(rates) / 1e9:.3g} GB/s of the tensor")
    hosts = [one.host for one in readings if one.host is not None]
    if skipped := sum(host.gpus is None and not host.gpus_error for host in hosts):
        lines.append(f"GPU memory errors: skipped on {skipped} of {len(hosts)} hosts, which have no nvidia-smi")
    return lines


def report(readings: Sequence[Reading], findings: Sequence[Finding], file: Path | None) -> None:
    """Print everything but the failures, and write the file."""
    console = Console(highlight=False, markup=False, width=200)
    console.print(table(readings))
    for note in notes(readings):
        print(note, flush=True)
    for finding in findings:
        if not finding.fails:
            _say(f"warning: {finding.text}")
    if file is not None:
        found = {"findings": [asdict(one) for one in findings], "readings": [asdict(one) for one in readings]}
        try:
            write_atomically(file, json.dumps(found, indent=2).encode())
        except OSError as error:
            raise ConfigError(f"cannot write --json {file}: {error.strerror}") from None


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Limits]:
    """The options, and the limits among them."""
    usage = Limits()
    parser = Parser(
        prog="python -m launch health",
        description="Check devices, network, disks and clocks of all ranks before a run's first step.",
        epilog="Exit code 0: healthy; 1: not; 2: a mistake in what was given.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the run's, on the shared file system")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all readings and findings")
    for name, unit, scale, text in (
        ("slow", "SHARE", 1, "of the median: slower matrix products and exchanges fail on GPUs and warn on CPUs"),
        ("disk-warn", "GB", 1e9, "10^9 bytes free in FOLDER and TMPDIR, below which to warn"),
        ("disk-fail", "GB", 1e9, "the same, below which to fail"),
        ("skew-warn", "S", 1, "seconds between a host's clock and the first one's, beyond which to warn"),
        ("skew-fail", "S", 1, "the same, beyond which to fail"),
    ):
        default = getattr(usage, name.replace("-", "_")) / scale
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar=unit, help=f"{text} (default {default:g})"
        )
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT, metavar="S", help=f"seconds for everything (default {_TIMEOUT:g})"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.slow <= 1:
        raise ConfigError(f"--slow is {options.slow:g}: write a share of the median, above 0 and at most 1")
    if not options.timeout > 0:
        raise ConfigError(f"--timeout is {options.timeout:g}: write a number of seconds above 0")
    scales = {"disk_warn": 1e9, "disk_fail": 1e9}
    limits = {one.name: getattr(options, one.name) * scales.get(one.name, 1) for one in fields(Limits)}
    return options, Limits(**limits)


def main(arguments: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # which the launcher blocks, and nobody here awaits
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    deadline = None
    try:
        options, limits = parse(arguments)
        deadline = Deadline(options.timeout)
        with joined("auto") as world:
            try:
                readings = check(world, options.folder, deadline)
                findings = judge(readings, limits)
                Ranks(world.control).first(lambda: report(readings, findings, options.json))
                if any(finding.fails for finding in findings):
                    raise Unhealthy(*(one.text for one in findings if one.fails and world.is_main))
                if world.is_main:
                    hosts = {one.place.host for one in readings}
                    print(f"healthy: {world.size} ranks on {len(hosts)} hosts", flush=True)
            except Unhealthy as unhealthy:  # said here: on the way out a device that hangs may hang this process too
                for finding in unhealthy.findings:
                    _say(f"unhealthy: {finding}")
                deadline.line = ""
                raise
        return 0
    except ConfigError as error:
        if rank_in_environment() == 0:  # all ranks have been given the same
            _say(f"error: {error}")
        return 2
    except Unhealthy:
        return 1
    except RuntimeError as error:  # of torch.distributed, as the ranks meet or part
        _say(f"unhealthy: host {socket.gethostname()} rank {rank_in_environment()}: {one_line(error)}")
        return 1
    finally:
        if deadline is not None:
            deadline.lift()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
