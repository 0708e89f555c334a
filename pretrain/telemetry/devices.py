"""The peak that MFU divides by: from the makers' data sheets for GPUs, measured for CPUs."""

from __future__ import annotations

import re
import time
from typing import Literal, NamedTuple

import torch


class Peak(NamedTuple):
    """Dense FLOP/s, without structured sparsity and with fp32 accumulation; fp32 is without tensor cores."""

    bf16: float
    tf32: float
    fp32: float


# Names as torch.cuda.get_device_name gives them. They match in full: a variant that is not listed, or a MIG slice
# ("NVIDIA A100-SXM4-40GB MIG 1g.5gb"), has another peak. Since Hopper the data sheets print tensor-core figures with
# 2:4 sparsity; these are the halves.
_PEAKS: dict[str, Peak] = {
    # NVIDIA A100 data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4): SXM and PCIe alike
    r"(NVIDIA )?A100-(SXM4?|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe": Peak(312e12, 156e12, 19.5e12),
    # NVIDIA H100 data sheets (resources.nvidia.com/en-us-tensor-core, nvidia.com/en-us/data-center/h100)
    r"NVIDIA H100 80GB HBM3": Peak(989.4e12, 494.7e12, 66.9e12),
    r"NVIDIA H100 PCIe|NVIDIA H100 80GB HBM2e": Peak(756e12, 378e12, 51.2e12),
    r"NVIDIA H100 NVL": Peak(835.5e12, 417.5e12, 60e12),
    # NVIDIA H200 and GH200 data sheets: the H100 SXM's compute with more memory
    r"NVIDIA H200": Peak(989.4e12, 494.7e12, 66.9e12),
    r"NVIDIA H200 NVL": Peak(835.5e12, 417.5e12, 60e12),
    r"NVIDIA GH200 (480|120)GB|NVIDIA GH200 144G HBM3e": Peak(989.4e12, 494.7e12, 66.9e12),
    # NVIDIA Blackwell data sheet (blackwell-datasheet-3384703), HGX B200 and GB200 NVL72, for each GPU
    r"NVIDIA B200": Peak(2250e12, 1100e12, 75e12),
    r"NVIDIA GB200": Peak(2500e12, 1250e12, 80e12),
    # NVIDIA L4 and L40S data sheets; NVIDIA Ada GPU architecture white paper for the GeForce RTX 4090
    r"NVIDIA L4": Peak(121e12, 60e12, 30.3e12),
    r"NVIDIA L40S": Peak(362e12, 183e12, 91.6e12),
    r"NVIDIA GeForce RTX 4090": Peak(165.2e12, 82.6e12, 82.6e12),
    # AMD Instinct MI300X data sheet
    r"AMD Instinct MI300X.*": Peak(1307.4e12, 653.7e12, 163.4e12),
}


def gpu_peak(name: str) -> Peak | None:
    """The peak of the GPU that ``torch.cuda.get_device_name`` calls ``name``; None if its data sheet is not listed."""
    return next((peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)), None)


def device_peak(device: torch.device, compute: Literal["fp32", "bf16"]) -> float | None:
    """FLOP/s that one device could reach in matrix products of the compute type; None for an unlisted GPU.

    On a GPU fp32 means tf32 where ``torch.set_float32_matmul_precision`` allows it. On a CPU there is no
    trustworthy figure, so a matrix product is timed (0.3 s): the MFU of a CPU run is its share of what this process
    reaches with its threads in products alone, and can only be compared with runs of the same machine.
    """
    if device.type == "cuda":
        peak = gpu_peak(torch.cuda.get_device_name(device))
        if peak is None or compute == "bf16":
            return peak and peak.bf16
        return peak.fp32 if torch.get_float32_matmul_precision() == "highest" else peak.tf32
    return measure_matmul(device, torch.bfloat16 if compute == "bf16" else torch.float32)


def measure_matmul(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = (512, 1024), seconds: float = 0.3
) -> float:
    """FLOP/s of the fastest product of two square matrices found in ``seconds``, shared by the ``sizes``.

    Small ones are fastest on few busy cores, large ones on many.
    """
    assert device.type == "cpu", "other devices return before they have computed"
    return max(_fastest_product(size, dtype, seconds / len(sizes)) for size in sizes)


@torch.no_grad()
def _fastest_product(size: int, dtype: torch.dtype, seconds: float) -> float:
    left, right = torch.ones(2, size, size, dtype=dtype)
    left @ right  # the first one sets up threads and packs kernels
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or fastest == float("inf"):
        left @ right
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
