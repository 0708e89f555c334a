"""What the health check (launch/health.py) reads on every rank: devices, network, disks, clocks.

What is computed or sent has a value that is known exactly, so that a device or a link that corrupts data shows. Links
are timed in pairs around two rings, the ranks of a host and the ranks of one place on all hosts: in a collective over
all ranks, one slow link slows all. Each pair of NCCL ranks has a communicator of its own, so that a link that hangs
holds up its two ranks only.
"""

from __future__ import annotations

import csv
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

import pretrain
from pretrain.distributed import World
from pretrain.files import write_synced
from pretrain.telemetry.devices import measure_matmul
from pretrain.watchdog import one_line

INSIDE, BETWEEN = "inside", "between"  # pairs within a host, and between two

_SQUARE = {"cpu": 512, "cuda": 8192}  # rows of the matrices; a multiple of 4
_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}  # of 4 bytes, which a pair exchanges and the all-reduce sums
_SECONDS = {"cpu": 0.2, "cuda": 2.0}  # of matrix products: as long as a GPU needs to get warm and lower its clock
_TIMES = 5  # an exchange and the all-reduce are repeated
_VISIBLE = 5.0  # seconds until a new file must be seen on other hosts. Its name is new too: nothing has cached it
_ANSWER = 30.0  # seconds for nvidia-smi, which a broken GPU may hang


@dataclass(frozen=True)
class Place:
    """Where a rank runs. ``device`` is what the maker calls its kind; ``index`` the GPU's on its host, None on CPU."""

    rank: int
    host: str
    device: str
    index: int | None = None

    @property
    def name(self) -> str:
        return f"host {self.host} " + (f"rank {self.rank}" if self.index is None else f"device {self.index}")


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi says of a GPU's memory, in its own words: counts, Yes, No, [N/A]. ``index`` is its own too."""

    index: str
    uuid: str
    uncorrected: str  # volatile ECC errors, which are counted since the driver was loaded
    retirement: str = "[N/A]"  # of pages, pending
    remapping: str = "[N/A]"  # of rows, pending
    failed_remapping: str = "[N/A]"


@dataclass(frozen=True)
class Host:
    """What is one for all ranks of a host. Free space in bytes, ``skew`` in seconds ahead of rank 0's clock."""

    python: str
    torch: str
    code: str  # the folder that this code was imported from
    temporary: str  # the folder for temporary files
    temporary_free: int
    folder_free: int | None  # in the run's folder; None where it is not there
    gpus: list[Gpu] | None  # None without nvidia-smi, and if it failed
    gpus_error: str = ""  # why it failed
    skew: float = 0.0


@dataclass(frozen=True)
class Exchange:
    """What a rank exchanged with a peer. ``rate`` in bytes per second, one way; ``wrong`` elements were received."""

    kind: str
    peer: int
    rate: float
    wrong: int


@dataclass
class Reading:
    """All that a rank has read. ``host`` on the first rank of each host, ``unseen`` on rank 0; None: not measured."""

    place: Place
    flops: float | None = None  # per second, in matrix products
    wrong_products: int = 0  # elements
    error: str = ""  # what the device raised
    hidden: str = ""  # why what rank 0 wrote into the run's folder is not seen here, or nothing can be written
    unseen: list[int] = field(default_factory=list)  # ranks that wrote there what rank 0 does not see
    exchanges: list[Exchange] = field(default_factory=list)
    all_reduce: float | None = None  # bytes per second: of the tensor, not of what crosses a link
    wrong_sums: int = 0  # elements
    host: Host | None = None


def place_of(world: World) -> Place:
    """This process's own."""
    host = socket.gethostname()
    if world.device.type == "cpu":
        return Place(world.rank, host, "cpu")
    return Place(world.rank, host, torch.cuda.get_device_name(world.device), world.device.index)


def hosts_of(places: Iterable[Place]) -> dict[str, list[int]]:
    """The ranks of each host, in order."""
    hosts: dict[str, list[int]] = {}
    for place in sorted(places, key=lambda one: one.rank):
        hosts.setdefault(place.host, []).append(place.rank)
    return hosts


def timed(work: Callable[[], object], device: torch.device, times: int) -> list[float]:
    """The seconds that each of ``times`` calls took on the device."""
    if device.type == "cpu":
        clock = [time.perf_counter()]
        for _ in range(times):
            work()
            clock.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(clock)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]


# ------------------------------------------------------------------ devices


def known_product(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two square matrices of random odd integers, and their product, which no order of summation rounds.

    With r and c of ±1, ±3 and k of ±1, ±3, ±5, ±7 in equal shares, the product of r k' and k c' is (k'k) r c', where
    k'k is 21 times the size. For a power of two up to 8192, all partial sums are integers below 2^21, exact in fp32,
    and the results ±21, ±63 and ±189 times it have the 8 significant bits of bf16.
    """
    draw = torch.Generator().manual_seed(size)
    rows, columns = 2 * torch.randint(-2, 2, (2, size), generator=draw) + 1.0
    inner = torch.tensor([1.0, 3.0, 5.0, 7.0]).repeat(size // 4)[torch.randperm(size, generator=draw)]
    inner *= 2 * torch.randint(0, 2, (size,), generator=draw) - 1
    rows, columns, inner = (vector.to(device) for vector in (rows, columns, inner))
    factors = torch.outer(rows, inner), torch.outer(inner, columns)
    return factors[0].to(dtype), factors[1].to(dtype), (torch.outer(rows, columns) * 21 * size).to(dtype)


def read_device(reading: Reading, device: torch.device) -> None:
    """FLOP/s of matrix products, bf16 on a GPU and fp32 on a CPU, and how many elements came out wrong."""
    kind = device.type
    size = _SQUARE[kind]
    try:
        if kind == "cpu":
            left, right, expected = known_product(size, torch.float32, device)
            reading.flops = measure_matmul(device, torch.float32, (size // 2, size), _SECONDS[kind])
            reading.wrong_products = int((left @ right != expected).sum())
            return
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # would round partial sums
        left, right, expected = known_product(size, torch.bfloat16, device)
        product = torch.empty_like(expected)
        timed(lambda: torch.mm(left, right, out=product), device, 10)  # chooses the kernel
        seconds: list[float] = []
        end = time.perf_counter() + _SECONDS[kind]
        while not seconds or time.perf_counter() < end:
            product.zero_()
            seconds += timed(lambda: torch.mm(left, right, out=product), device, 10)
            reading.wrong_products = max(reading.wrong_products, int((product != expected).sum()))
        reading.flops = 2 * size**3 / median(seconds)
    except RuntimeError as error:  # a broken device's, or one without memory left
        reading.error = one_line(error)


def ask_nvidia_smi() -> tuple[list[Gpu] | None, str]:
    """The GPUs it lists, or why it has nothing to say: an error, or no word if it is not there."""
    if shutil.which("nvidia-smi") is None:
        return None, ""
    try:
        fields = "index,uuid,ecc.errors.uncorrected.volatile.total,retired_pages.pending"
        asked = _nvidia_smi(f"--query-gpu={fields}")
        if asked.returncode != 0:
            said = (asked.stderr + asked.stdout).strip().splitlines()
            return None, f"nvidia-smi failed: {said[0] if said else f'exit code {asked.returncode}'}"
        remapped = _nvidia_smi("--query-remapped-rows=gpu_uuid,remapped_rows.pending,remapped_rows.failure")
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvidia-smi failed: {one_line(error)}"
    # Drivers from before Ampere do not know of rows that are remapped, and refuse the question.
    return parse_gpus(asked.stdout, remapped.stdout if remapped.returncode == 0 else ""), ""


def _nvidia_smi(query: str) -> subprocess.CompletedProcess[str]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER, check=False)


def parse_gpus(gpus: str, rows: str) -> list[Gpu]:
    """From the answers to --query-gpu and to --query-remapped-rows, joined by the GPU's uuid."""
    remapped = {line[0]: line[1:3] for line in csv.reader(rows.splitlines(), skipinitialspace=True) if len(line) == 3}
    found = [line for line in csv.reader(gpus.splitlines(), skipinitialspace=True) if len(line) == 4]
    return [Gpu(*line, *remapped.get(line[1], [])) for line in found]


# ------------------------------------------------------------------ hosts


def read_host(folder: Path) -> Host:
    """Everything but the clock."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = None
    temporary = tempfile.gettempdir()
    return Host(
        platform.python_version(),
        torch.__version__,
        str(Path(pretrain.__file__).resolve().parents[1]),
        temporary,
        shutil.disk_usage(temporary).free,
        free,
        *ask_nvidia_smi(),
    )


def read_skew(world: World, leads: Sequence[int], rounds: int = 8) -> float:
    """Seconds that this host's clock is ahead of rank 0's, asked by the first rank of each host; 0 elsewhere.

    As NTP does it (RFC 5905, 8): rank 0 read its clock halfway between question and answer, give or take half the round
    trip; the fastest of several says it most exactly.
    """
    others = [lead for lead in leads if lead != 0]
    clock = torch.zeros(1, dtype=torch.float64)
    if world.rank == 0:
        for lead in others:
            for _ in range(rounds):
                dist.recv(clock, lead, group=world.control)
                clock.fill_(time.time())
                dist.send(clock, lead, group=world.control)
    elif world.rank in others:
        asked = []
        for _ in range(rounds):
            before = time.time()
            dist.send(clock, 0, group=world.control)
            dist.recv(clock, 0, group=world.control)
            after = time.time()
            asked.append((after - before, (before + after) / 2 - clock.item()))
        return min(asked)[1]
    return 0.0


# ------------------------------------------------------------------ the run's folder


def token_name() -> str:
    """Of the folder where ranks show each other files for a moment: a name that no file system has seen before."""
    return f".health-{uuid.uuid4().hex}"


def show(token: Path, rank: int) -> str:
    """Write this rank's file, rank 0 the folder for all of them; why that failed."""
    try:
        if rank == 0:
            token.mkdir(parents=True)
        write_synced(token / str(rank), token.name.encode())
    except OSError as error:
        return f"cannot write into {token.parent}: {os.strerror(error.errno or 0)}"
    return ""


def sees(token: Path, rank: int, until: float) -> bool:
    """Whether that rank's file is here, or comes before ``until`` (of time.monotonic)."""
    while True:
        try:
            if (token / str(rank)).read_bytes() == token.name.encode():
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def look(token: Path, rank: int) -> str:
    """Why this rank does not see what rank 0 wrote, or cannot write beside it."""
    if not sees(token, 0, time.monotonic() + _VISIBLE):
        return f"does not see what rank 0 wrote into {token.parent}: it is not the same file system"
    return show(token, rank) if rank else ""


def unseen(token: Path, ranks: Iterable[int]) -> list[int]:
    """Those of ``ranks``, who say that they have written, whose files rank 0 does not see. Clears up."""
    until = time.monotonic() + _VISIBLE
    missing = [rank for rank in ranks if not sees(token, rank, until)]
    shutil.rmtree(token, ignore_errors=True)
    return missing


# ------------------------------------------------------------------ the network between devices


def ring_rounds(ring: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The neighbours around a ring, in rounds in which everyone has one partner at most."""
    if len(ring) < 2:
        return []
    pairs = list(pairwise(ring))
    closing = [(ring[-1], ring[0])] if len(ring) > 2 else []
    rounds = [pairs[0::2], pairs[1::2] + (closing if len(ring) % 2 == 0 else []), closing if len(ring) % 2 else []]
    return [each for each in rounds if each]


def pair_rounds(places: Sequence[Place]) -> list[tuple[str, list[tuple[int, int]]]]:
    """Whom to exchange with, round by round: first within hosts, then between, all ranks of a host at a time."""
    hosts = list(hosts_of(places).values())
    across = [[ranks[i] for ranks in hosts if i < len(ranks)] for i in range(max(map(len, hosts)))]
    return [
        (kind, list(chain.from_iterable(together)))
        for kind, rings in ((INSIDE, hosts), (BETWEEN, across))
        for together in zip_longest(*map(ring_rounds, rings), fillvalue=())
    ]


def exchange(world: World, kind: str, peer: int | None) -> Exchange | None:
    """Send random bits to the peer, if there is one, and receive its own, in turn."""
    if peer is None:
        return None
    mine, theirs = _bits(world.rank, world.device), _bits(peer, world.device)
    received = torch.zeros_like(theirs)
    first = world.rank < peer

    def there_and_back() -> None:
        for sends in (first, not first):
            if sends:
                dist.send(mine, peer)
            else:
                dist.recv(received, peer)

    timed(there_and_back, world.device, 1)  # connects
    received.zero_()
    seconds = median(timed(there_and_back, world.device, _TIMES))
    rate = 2 * mine.nbytes / seconds
    return Exchange(kind, peer, rate, int((received != theirs).sum()))


def _bits(seed: int, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (_ELEMENTS[device.type],), dtype=torch.int32, generator=draw).to(device)


def read_all_reduce(reading: Reading, world: World) -> None:
    """Bytes per second of a sum over all ranks, and how many elements came out wrong."""
    if world.size == 1:
        return
    ramp = torch.arange(_ELEMENTS[world.device.type], device=world.device, dtype=torch.int32) % 1024
    shifts = sum(rank % 1024 for rank in range(world.size))
    expected = (world.size * ramp + shifts).float()  # integers below 2^24 for up to 8192 ranks: exact in fp32
    world.sum(expected.clone())  # connects
    seconds = []
    for _ in range(_TIMES):
        summed = (ramp + world.rank % 1024).float()
        seconds += timed(partial(world.sum, summed), world.device, 1)
        reading.wrong_sums = max(reading.wrong_sums, int((summed != expected).sum()))
    reading.all_reduce = expected.nbytes / median(seconds)
