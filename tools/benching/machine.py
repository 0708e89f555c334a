"""What this machine can do at best, measured where the benchmark runs, and what a reader needs to know of it."""

from __future__ import annotations

import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pretrain.distributed import World
from pretrain.run import environment
from pretrain.telemetry import device_peak
from pretrain.telemetry.devices import measure_matmul
from tools.benching.timing import timed

PEERS = ("transformers", "safetensors", "litgpt", "torchtitan", "liger-kernel", "triton")
_CHUNK = 1 << 24


class DiskSpeed(NamedTuple):
    """Bytes per second of a plain file: written until the disk has it, and read when no memory holds it."""

    write: float
    read: float


def describe(world: World) -> dict[str, Any]:
    """pretrain's own record of the environment, with the peers' versions."""
    found = environment(world)
    found["packages"] = found["packages"] | {name: _version(name) for name in PEERS}
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def matmul_rate(device: torch.device, compute: Literal["fp32", "bf16"], seconds: float = 0.5) -> float:
    """FLOP/s of large square products of the compute type alone: the ceiling beside which an MFU is judged here.

    Not the data sheet's, which no product reaches (an H100's 989 TFLOP/s are 795 in practice).
    """
    if device.type == "cpu":
        peak = device_peak(device, compute)
        assert peak is not None, "a CPU's is measured"
        return peak
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    return measure_matmul(device, dtype, (4096, 8192), seconds)


def copy_bandwidth(device: torch.device, size: int | None = None, seconds: float = 0.5) -> float:
    """Bytes per second that go through the device's memory when a tensor is copied, those read and those written.

    ``size``: bytes of the tensor, by default more than any cache holds.
    """
    if size is None:
        size = 1 << 30 if device.type == "cuda" else 1 << 28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or fastest == float("inf"):
        fastest = min(fastest, timed(lambda: target.copy_(source), device))
    return 2 * size / fastest


def disk_speed(folder: Path, size: int) -> DiskSpeed:
    """Of a file of ``size`` bytes in ``folder``, which is gone afterwards."""
    path = folder / "disk-speed"
    block = os.urandom(min(size, _CHUNK))  # a disk that compresses gains nothing
    try:
        write = timed(lambda: _write(path, block, size))
        read = read_speed(path)
    finally:
        path.unlink(missing_ok=True)
    return DiskSpeed(size / write, read)


def read_speed(path: Path, most: int = 1 << 30) -> float:
    """Bytes per second of reading a file's first ``most`` bytes from the disk."""
    forget(path)
    size = min(most, path.stat().st_size)
    return size / timed(lambda: _read(path, size))


def _write(path: Path, block: bytes, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for begin in range(0, size, len(block)):
            file.write(block[: size - begin])
        os.fsync(file.fileno())


def _read(path: Path, size: int) -> None:
    memory = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while size > 0 and (count := file.readinto(memory)):
            size -= count


def sync(path: Path) -> None:
    """Until the disk has the file, or all files of the folder."""
    for file in _files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def forget(path: Path) -> None:
    """Let the kernel drop what its memory holds of the file or of a folder's files, so that the disk is read next.

    Only a wish (posix_fadvise(2)), and heeded for pages that the disk has: ``sync`` first. macOS has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for file in _files(path):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in _files(path))
