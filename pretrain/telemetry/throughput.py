"""Tokens per second, MFU, and the share of the time that the step waited for data."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pretrain.config import RunConfig
from pretrain.counts import Counts
from pretrain.distributed import World
from pretrain.telemetry.devices import device_peak
from pretrain.telemetry.flops import flops_per_token, mfu


class Throughput:
    """Rates since the last ``read``. Validation and checkpoints (``paused``) do not count as training time.

    ``matmul_parameters``: parameters in matrix products, a tied head's among them.
    """

    def __init__(self, config: RunConfig, world: World, counts: Counts, matmul_parameters: int) -> None:
        self._counts = counts
        self._cuda = world.device.type == "cuda"
        self._devices = world.size if self._cuda else 1  # ranks on one CPU share its ceiling
        self._flops = flops_per_token(matmul_parameters, config.model.depth, config.model.width, counts.sequence_length)
        self._peak = device_peak(world.device, config.precision.compute)
        self._step: int | None = None
        self._waited = 0.0
        self._since = time.monotonic()

    def start(self, step: int) -> None:
        """``step`` steps are done and the clock starts."""
        self._step, self._waited, self._since = step, 0.0, time.monotonic()

    def waited(self, seconds: float) -> None:
        """The step waited so long for its batch."""
        self._waited += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self._cuda:  # what is still queued is training, not the pause
            torch.cuda.synchronize()
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def read(self, step: int) -> dict[str, float | None]:
        """``tokens_per_second`` over all ranks, ``mfu`` and ``data_share`` since the last read."""
        assert self._step is not None, "start() comes first"
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = (step - self._step) * self._counts.batch_tokens / seconds
        values = {
            "tokens_per_second": rate,
            "mfu": mfu(rate, self._flops, self._peak, self._devices),
            "data_share": self._waited / seconds,
        }
        self.start(step)
        return values


def memory_gb(device: torch.device) -> float:
    """The most memory so far, in 10^9 bytes: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_resident_bytes() / 1e9


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident, in bytes.

    Linux keeps ``ru_maxrss`` across exec (getrusage(2)), so there it is at least what the process that started this one
    had at that moment; ``VmHWM`` (proc_pid_status(5)) begins anew.
    """
    if sys.platform == "linux":
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, the BSDs KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
