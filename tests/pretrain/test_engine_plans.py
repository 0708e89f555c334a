"""Plans with linears, residual scales or blocks of their own kind train alike under every engine.

The parity gate (test_engine_parity.py) has the settings that share the work; here are models that read their parameters
in other ways than a plain linear or norm does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models import ConfigError
from pretrain.config import RunConfig
from pretrain.engines.combinations import unheeded
from tests.pretrain.engine_runs import config_of, here, train, train_all
from tests.pretrain.test_engine_parity import BF16, FP32
from tests.ranks import run_ranks
from tests.runs import pretrain, write_config

PLANS = ["sigma-reparam", "nf", "fixup", "hybridnorm-star"]
STEPS = 6
MODES: dict[str, dict[str, Any]] = {
    "FSDP2 full": {"shard": "full"},
    "ZeRO-1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO-3": {"engine": "deepspeed", "zero_stage": 3},
}


def configs(parallel: dict[str, Any], compute: str, **train: Any) -> dict[str, RunConfig]:
    return {
        plan: config_of(plan, "adamw", parallel=parallel, precision={"compute": compute}, train=train) for plan in PLANS
    }


IN_SUITE = {("fp32", "FSDP2 full"), ("fp32", "ZeRO-3"), ("bf16", "FSDP2 full")}  # the rest is a survey
CASES = [
    pytest.param(mode, compute, tolerance, marks=() if (compute, mode) in IN_SUITE else pytest.mark.survey)
    for compute, tolerance in (("fp32", FP32), ("bf16", BF16))
    for mode in MODES
]


@pytest.mark.parametrize(("mode", "compute", "tolerance"), CASES)
def test_agrees_with_one_process(mode: str, compute: str, tolerance: float) -> None:
    expected = {plan: train(config, STEPS) for plan, config in configs({}, compute).items()}
    for found in run_ranks(train_all, 2, configs(MODES[mode], compute), STEPS, timeout=200):
        for plan, steps in expected.items():
            assert found[plan] == [pytest.approx(step, rel=tolerance) for step in steps], plan


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_no_loss(recompute: str) -> None:
    plain = {plan: train(config, STEPS) for plan, config in configs({}, "fp32").items()}
    again = {plan: train(c, STEPS) for plan, c in configs({}, "fp32", activation_checkpointing=recompute).items()}
    assert again == plain


@pytest.mark.parametrize("plan", ["sigma-reparam", "nf"])
def test_8_bit_linears_are_refused(plan: str) -> None:
    """They would take the weight as it is."""
    with pytest.raises(
        ConfigError, match=r"precision\.fp8 rowwise with linears whose weights are (sigma|stand)"
    ) as told:
        train(config_of(plan, precision={"fp8": "rowwise"}), 0)
    assert "--model.weights plain" in str(told.value)
    assert "\n" not in str(told.value)


def test_settings_that_a_rule_leaves_no_room_for_are_told() -> None:
    (line,) = unheeded(config_of("fixup"), here())
    assert "model.init.std" in line
    assert "fixup" in line
    assert unheeded(config_of("dnt"), here()) == []


def test_a_recipe_that_is_known_to_fail_is_told_at_start(corpus: Path, tmp_path: Path) -> None:
    """Once, from one of two ranks, and the run goes on."""
    config = write_config(tmp_path, corpus, {"train": {"steps": 2}, "schedule": {"warmup_steps": 1}})
    done = pretrain(config, "--model.plan", "dyt", "--optimizer.lr", "0.001", ranks=2)
    assert done.returncode == 0, done.stderr
    head, weights = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "--model.sites.final none" in head
    assert "--model.init.std fan_in" in weights
