"""The parity gate: whatever engine, sharding and precision, the same losses and gradient norms step by step."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from pretrain.config import RunConfig
from tests.pretrain.engine_runs import config_of, train, train_all
from tests.ranks import run_ranks

Losses = dict[tuple[str, str], list[tuple[float, float]]]

CELLS = list(product(("dnt", "dyt"), ("adamw", "msgdw")))
FEW = [("dnt", "msgdw"), ("dyt", "adamw")]  # where a setting is tested that has nothing to do with the optimizer
FP32 = 1e-5  # sums in another order, over ten steps; the largest difference seen is 5e-7
# A rank's part of a matrix's gradient is rounded to bf16 (2^-9 of itself) before ranks add theirs in fp32, and ten
# steps carry the difference on. The largest seen is 3.4e-3, in a gradient norm.
BF16 = 2**-7

MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "replicate": (2, {"shard": "replicate"}),
    "FSDP2 full": (2, {"shard": "full"}),
    "FSDP2 grad_op": (2, {"shard": "grad_op"}),
    "FSDP2 hybrid": (4, {"shard": "hybrid", "shard_size": 2}),
    **{f"ZeRO-{stage}": (2, {"engine": "deepspeed", "zero_stage": stage}) for stage in range(4)},
}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "full, accumulated": (2, {"train": {"micro_batch": 2}}),
    "hybrid, accumulated": (4, {"parallel": {"shard": "hybrid", "shard_size": 2}, "train": {"micro_batch": 1}}),
    "replicate, accumulated": (2, {"parallel": {"shard": "replicate"}, "train": {"micro_batch": 2}}),
    "full, offloaded": (2, {"parallel": {"cpu_offload": True}}),
    "full, prefetch 2": (2, {"parallel": {"prefetch": 2}}),
    "full, no clip": (2, {"train": {"clip": None}}),
    **{
        f"ZeRO-{stage}, accumulated": (
            2,
            {"parallel": {"engine": "deepspeed", "zero_stage": stage}, "train": {"micro_batch": 2}},
        )
        for stage in range(4)
    },
    **{
        f"ZeRO-{stage}, offloaded": (
            2,
            {"parallel": {"engine": "deepspeed", "zero_stage": stage, "cpu_offload": True}},
        )
        for stage in (1, 2, 3)
    },
    "ZeRO-0, no clip": (2, {"parallel": {"engine": "deepspeed", "zero_stage": 0}, "train": {"clip": None}}),
    "ZeRO-2 on 4": (4, {"parallel": {"engine": "deepspeed", "zero_stage": 2}}),
}


def few(**sections: dict[str, Any]) -> dict[Any, RunConfig]:
    return {key: config for key, config in cells(**sections).items() if key in FEW}


def cells(**sections: dict[str, Any]) -> dict[Any, RunConfig]:
    return {(plan, optimizer): config_of(plan, optimizer, **sections) for plan, optimizer in CELLS}


def alone(**sections: dict[str, Any]) -> Losses:
    return {key: train(config) for key, config in cells(**sections).items()}


@pytest.fixture(scope="module")
def fp32() -> Losses:
    return alone()


@pytest.fixture(scope="module")
def bf16() -> Losses:
    return alone(precision={"compute": "bf16"})


def assert_close(found: Losses, expected: Losses, tolerance: float) -> None:
    for key, steps in expected.items():
        assert found[key] == [pytest.approx(step, rel=tolerance) for step in steps], key


@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_one_process(mode: str, fp32: Losses, bf16: Losses) -> None:
    ranks, parallel = MODES[mode]
    configs = {
        (compute, *key): config
        for compute in ("fp32", "bf16")
        for key, config in cells(parallel=parallel, precision={"compute": compute}).items()
    }
    for found in run_ranks(train_all, ranks, configs, timeout=250):
        assert_close({key: found["fp32", *key] for key in CELLS}, fp32, FP32)
        assert_close({key: found["bf16", *key] for key in CELLS}, bf16, BF16)
        for key in CELLS:  # before the first update no difference has had time to grow
            assert found["bf16", *key][0] == pytest.approx(bf16[key][0], rel=2**-9), key


@pytest.mark.drill
@pytest.mark.parametrize("case", OTHERS)
def test_settings_that_share_the_work_change_no_loss(case: str, fp32: Losses) -> None:
    ranks, sections = OTHERS[case]
    expected = train_all(few(train={"clip": None})) if "no clip" in case else {key: fp32[key] for key in FEW}
    for found in run_ranks(train_all, ranks, few(**sections), timeout=200):
        assert_close(found, expected, FP32)


def test_bf16_is_not_fp32(fp32: Losses, bf16: Losses) -> None:
    """The bounds above tell the two precisions apart."""
    with pytest.raises(AssertionError):
        assert_close(bf16, fp32, FP32)
