"""The FLOP formula against torch's own counter, and the table of peaks against real device names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.telemetry import device_peak, flops_per_token, mfu
from pretrain.telemetry.devices import gpu_peak, measure_matmul


class Plain(nn.Module):
    """A transformer of nothing but embeddings, linears and attention, with a tied head."""

    def __init__(self, vocabulary: int, depth: int, width: int, heads: int, sequence: int) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(sequence, width))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
            self.blocks.append(nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in sizes))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions
        for qkv, out, up, down in self.blocks:  # type: ignore[misc]
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(mixed.transpose(1, 2).flatten(-2))
            x = x + down(F.gelu(up(x)))
        return F.linear(x, self.embed.weight)


@pytest.mark.parametrize("depth", [1, 3])
def test_formula_is_what_the_counter_counts(depth: int) -> None:
    batch, sequence, width, vocabulary = 2, 48, 32, 96
    with torch.device("meta"):
        model = Plain(vocabulary, depth, width, heads=4, sequence=sequence)
        tokens = torch.zeros(batch, sequence, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    # The math backend is plain matrix products over the whole square, as in the formula: flash attention would
    # be counted with its recomputation in the backward.
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    matrices = sum(p.numel() for p in model.blocks.parameters()) + vocabulary * width
    expected = flops_per_token(matrices, depth, width, sequence) * batch * sequence
    assert counter.get_total_flops() == expected  # both count the same products: equal to the last one


def test_mfu() -> None:
    # 1.3B at sequence 2048, 50,000 tokens/s on one H100: 46 % (the convention of torchtitan's tables)
    per_token = flops_per_token(1_280_000_000, depth=24, width=2048, sequence_length=2048)
    assert mfu(50_000, per_token, 989e12, devices=1) == pytest.approx(0.45, abs=0.01)
    assert mfu(8.0, 3.0, 4.0, devices=2) == 3.0
    assert mfu(8.0, 3.0, None, devices=2) is None


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
    ],
)
def test_known_devices(name: str, bf16: float) -> None:
    peak = gpu_peak(name)
    assert peak is not None
    assert peak.bf16 == bf16
    # tensor cores do tf32 at half the rate of bf16, give or take rounding in the data sheets
    assert peak.tf32 == pytest.approx(bf16 / 2, rel=0.03)
    assert peak.fp32 <= peak.tf32


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",  # a slice is not the device
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA L40",  # half an L40S
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H20",
        "Tesla T4",
        "",
    ],
)
def test_unlisted_devices_have_no_peak(name: str) -> None:
    assert gpu_peak(name) is None


def test_compute_type_selects_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"name": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names["name"])
    before = torch.get_float32_matmul_precision()
    cuda = torch.device("cuda")
    try:
        torch.set_float32_matmul_precision("highest")
        assert device_peak(cuda, "bf16") == 989.4e12
        assert device_peak(cuda, "fp32") == 66.9e12
        torch.set_float32_matmul_precision("high")
        assert device_peak(cuda, "fp32") == 494.7e12
        names["name"] = "NVIDIA Something New"
        assert device_peak(cuda, "bf16") is None
        assert device_peak(cuda, "fp32") is None
    finally:
        torch.set_float32_matmul_precision(before)


def test_measured_peak_is_plausible() -> None:
    peak = measure_matmul(torch.device("cpu"), torch.float32, sizes=(128, 256), seconds=0.05)
    assert 1e8 < peak < 1e14  # one slow core; more than any CPU of today
