"""What devices can do: from the makers' data sheets for GPUs; the peak that MFU divides by, measured for CPUs."""

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


class Gpu(NamedTuple):
    """What a maker's data sheet says of one GPU.

    ``names`` matches what torch.cuda.get_device_name calls it. ``memory`` is in bytes, a data sheet's GB taken as 10^9
    (drivers show up to 7 % more). Links in bytes per second each way, of one GPU: ``intra_node`` to the others of its
    node, ``inter_node`` its share of the network in the maker's own server; None where there is no such server.
    """

    names: str
    peak: Peak
    memory: float
    intra_node: float
    inter_node: float | None = None


_A100 = Peak(312e12, 156e12, 19.5e12)
_H100_SXM = Peak(989.4e12, 494.7e12, 66.9e12)
_H100_NVL = Peak(835.5e12, 417.5e12, 60e12)

# Names match in full: a variant that is not listed, or a MIG slice ("NVIDIA A100-SXM4-40GB MIG 1g.5gb"), has another
# peak. Since Hopper the data sheets print tensor-core figures with 2:4 sparsity, and all print links in both
# directions together; these are the halves. Where an NVLink bridge joins only pairs of cards, intra_node is PCIe's.
GPUS: dict[str, Gpu] = {
    # NVIDIA A100 data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4): NVLink 3, 600 GB/s, and PCIe 4. DGX A100
    # data sheet: a 200 Gb/s adapter for each GPU
    "a100-40gb": Gpu(r"(NVIDIA )?A100-SXM4?-40GB", _A100, 40e9, 300e9, 25e9),
    "a100-80gb": Gpu(r"(NVIDIA )?A100-SXM4?-80GB", _A100, 80e9, 300e9, 25e9),
    "a100-pcie-40gb": Gpu(r"(NVIDIA )?A100-PCIE-40GB", _A100, 40e9, 32e9),
    "a100-pcie-80gb": Gpu(r"(NVIDIA )?A100-PCIE-80GB|NVIDIA A100 80GB PCIe", _A100, 80e9, 32e9),
    # NVIDIA H100 data sheets (resources.nvidia.com/en-us-tensor-core, nvidia.com/en-us/data-center/h100): NVLink 4,
    # 900 GB/s, and PCIe 5. DGX H100 data sheet: a 400 Gb/s adapter for each GPU
    "h100-80gb": Gpu(r"NVIDIA H100 80GB HBM3", _H100_SXM, 80e9, 450e9, 50e9),
    "h100-pcie": Gpu(r"NVIDIA H100 PCIe|NVIDIA H100 80GB HBM2e", Peak(756e12, 378e12, 51.2e12), 80e9, 64e9),
    "h100-nvl": Gpu(r"NVIDIA H100 NVL", _H100_NVL, 94e9, 64e9),
    # NVIDIA H200 and GH200 data sheets: the H100 SXM's compute with more memory; DGX H200's adapters are DGX H100's.
    # H200 NVL: a bridge of four with 900 GB/s. GH200: one GPU a node unless in an NVL32
    "h200": Gpu(r"NVIDIA H200", _H100_SXM, 141e9, 450e9, 50e9),
    "h200-nvl": Gpu(r"NVIDIA H200 NVL", _H100_NVL, 141e9, 450e9),
    "gh200-96gb": Gpu(r"NVIDIA GH200 (480|120)GB", _H100_SXM, 96e9, 450e9),
    "gh200-144gb": Gpu(r"NVIDIA GH200 144G HBM3e", _H100_SXM, 144e9, 450e9),
    # NVIDIA Blackwell data sheet (blackwell-datasheet-3384703), HGX B200 and GB200 NVL72, for each GPU: NVLink 5,
    # 1.8 TB/s; a 400 Gb/s adapter for each in DGX B200 and DGX GB200
    "b200": Gpu(r"NVIDIA B200", Peak(2250e12, 1100e12, 75e12), 180e9, 900e9, 50e9),
    "gb200": Gpu(r"NVIDIA GB200", Peak(2500e12, 1250e12, 80e12), 186e9, 900e9, 50e9),
    # NVIDIA L4 and L40S data sheets (PCIe 4); NVIDIA Ada GPU architecture white paper for the GeForce RTX 4090
    "l4": Gpu(r"NVIDIA L4", Peak(121e12, 60e12, 30.3e12), 24e9, 32e9),
    "l40s": Gpu(r"NVIDIA L40S", Peak(362e12, 183e12, 91.6e12), 48e9, 32e9),
    "rtx-4090": Gpu(r"NVIDIA GeForce RTX 4090", Peak(165.2e12, 82.6e12, 82.6e12), 24e9, 32e9),
    # AMD Instinct MI300X data sheet: seven Infinity Fabric links of 128 GB/s
    "mi300x": Gpu(r"AMD Instinct MI300X.*", Peak(1307.4e12, 653.7e12, 163.4e12), 192e9, 448e9),
}


def gpu_peak(name: str) -> Peak | None:
    """The peak of the GPU that ``torch.cuda.get_device_name`` calls ``name``; None if its data sheet is not listed."""
    return next((gpu.peak for gpu in GPUS.values() if re.fullmatch(gpu.names, name)), None)


def device_peak(device: torch.device, compute: Literal["fp32", "bf16"]) -> float | None:
    """FLOP/s that one device could reach in matrix products of the compute type; None for an unlisted GPU.

    On a GPU fp32 means tf32 where ``torch.set_float32_matmul_precision`` allows it. On a CPU there is no
    trustworthy figure, so matrix products are timed (0.3 s): the MFU of a CPU run is its share of what this process
    reaches with its threads in products alone, and can only be compared with runs of the same machine.
    """
    if device.type == "cuda":
        peak = gpu_peak(torch.cuda.get_device_name(device))
        if peak is None or compute == "bf16":
            return peak and peak.bf16
        return peak.fp32 if torch.get_float32_matmul_precision() == "highest" else peak.tf32
    # A CPU without bf16 arithmetic is faster in fp32, in which emulated fp8 products are computed.
    kinds = [torch.float32, torch.bfloat16] if compute == "bf16" else [torch.float32]
    return max(measure_matmul(device, dtype) for dtype in kinds)


def measure_matmul(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = (512, 1024), seconds: float = 0.3
) -> float:
    """FLOP/s of the fastest product of two square matrices found in ``seconds``, shared by the ``sizes``.

    Small ones are fastest on few busy cores, large ones on many; a GPU needs some thousands to be busy at all.
    """
    return max(_fastest_product(device, size, dtype, seconds / len(sizes)) for size in sizes)


@torch.no_grad()
def _fastest_product(device: torch.device, size: int, dtype: torch.dtype, seconds: float) -> float:
    # Random numbers: a GPU multiplies constants faster, at less power. Not of the generator that dropout draws from.
    generator = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, size, size, dtype=torch.float32, device=device, generator=generator).to(dtype)

    def product() -> None:
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    product()  # the first one sets up threads and packs kernels
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or fastest == float("inf"):
        product()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
