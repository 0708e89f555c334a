"""Where the profile says a step's time went: families by name, by what is around, and by what is undone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tools.small_run import WORLD, prepare_small, small_config
from tools.benching import profile
from tools.benching.profile import BETWEEN, FAMILIES, OTHER, Event, by_family, family_of


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["aten::mm", "aten::linear"], "matmul"),
        (["aten::mm", "bench: optimizer"], "optimizer"),  # Muon's products are the optimizer's
        (["aten::addmm_", "_ChunkedCrossEntropy"], "loss"),
        (["aten::bmm", "aten::scaled_dot_product_attention"], "attention"),
        (["aten::mul", "bench: norm"], "norm"),
        (["sm90_xmma_gemm_bf16bf16_bf16f32", "aten::mm"], "matmul"),
        (["void pytorch_flash::flash_fwd_kernel"], "attention"),
        (["triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0"], "norm"),
        (["Memcpy HtoD (Pinned -> Device)", "aten::to"], "data"),
        (["aten::mul", "aten::silu"], OTHER),
    ],
)
def test_a_family_is_told_by_names(names: list[str], family: str) -> None:
    assert family_of(names) == family


def test_families_sum_to_the_wall_clock() -> None:
    """Two steps of 5 s each, by hand; a backward without a family of its own is its forward's."""
    events = [
        Event(2.0, ("aten::mm",), 1, False),
        Event(1.0, ("aten::mul", "bench: norm"), 7, False),
        Event(3.0, ("aten::mul", "autograd::engine::evaluate_function: MulBackward0"), 7, True),
        Event(0.5, ("aten::add",), 8, False),
        Event(0.5, ("aten::sum", "autograd::engine::evaluate_function: AddBackward0"), 8, True),
    ]
    found = by_family(events, total=10.0, steps=2)
    assert found == {**dict.fromkeys(FAMILIES, 0.0), "matmul": 1.0, "norm": 2.0, OTHER: 0.5, BETWEEN: 1.5}
    # kernels that run at once: more work than time, of which there is then none between
    found = by_family([Event(8.0, ("aten::mm",), -1, False), Event(8.0, ("x",), -1, False)], total=8.0, steps=1)
    assert (found["matmul"], found[OTHER], found[BETWEEN]) == (4.0, 4.0, 0.0)


def test_a_step_of_ours_has_all_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, prepare_small(tmp_path))
    config = replace(config, model=replace(config.model, vocab_size=300))
    found = profile.measure(config, WORLD, steps=2, warmup=1)
    assert set(found.families) == set(FAMILIES)
    assert all(found.families[name] > 0 for name in FAMILIES)
    assert sum(found.families.values()) == pytest.approx(found.profiled)
    monkeypatch.setattr(profile, "matmul_rate", lambda device, compute: 1e9)
    limits = profile.limits(config, WORLD.device)
    first, *_ = profile.table(found, limits).rows
    assert first.values[0] == pytest.approx(1e3 * max(found.families.values()))
    # 128 tokens, two blocks of width 32 (feed-forward 128, of which three matrices), 300 pieces, 32 tokens to attend to
    assert limits["matmul"] == pytest.approx(128 * 6 * 2 * (4 * 32**2 + 3 * 32 * 128) / 1e9)
    assert limits["loss"] == pytest.approx(128 * 6 * 300 * 32 / 1e9)
    assert limits["attention"] == pytest.approx(128 * 12 * 2 * 32 * 32 / 1e9)


def test_the_backward_of_a_norm_is_the_norm_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With DyT in place of nothing, the norms' share is of both directions: more than the forward's range alone."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiling

    x = torch.randn(512, 512, requires_grad=True)
    with profiling(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function("bench: norm"):
            y = torch.tanh(x) * 2.0
        y.sum().backward()
    events = list(profile._events(profiler.events(), cuda=False))
    seconds = by_family(events, 1.0, 1)["norm"]
    forward = sum(event.seconds for event in events if "bench: norm" in event.names)
    backward = sum(e.seconds for e in events if any("TanhBackward" in n or "MulBackward" in n for n in e.names))
    assert backward > 0
    assert seconds == pytest.approx(forward + backward, rel=0.05)  # the functions around a node are not the node's
