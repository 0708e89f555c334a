"""What a run tells: metrics, FLOPs and MFU, the state of DyT's sites, the console."""

from pretrain.telemetry.console import RunConsole, open_console
from pretrain.telemetry.devices import device_peak
from pretrain.telemetry.flops import flops_per_token, mfu
from pretrain.telemetry.metrics import MetricsWriter
from pretrain.telemetry.sites import record_sites, scalars
from pretrain.telemetry.throughput import Throughput, memory_gb

__all__ = [
    "MetricsWriter",
    "RunConsole",
    "Throughput",
    "device_peak",
    "flops_per_token",
    "memory_gb",
    "mfu",
    "open_console",
    "record_sites",
    "scalars",
]
