"""Known failures are told in one line each, and only where they are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models import PLANS, ModelConfig, known_failures
from models.config import AlphaConfig, InitConfig, ResidualConfig
from pretrain.cli import load

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE = {"width": 4096, "heads": 32, "depth": 32, "vocab_size": 32000}


def lines(**changes: Any) -> list[str]:
    return known_failures(ModelConfig(**(LARGE | changes)))


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "identity"])
def test_every_plan_as_its_source_has_it(plan: str) -> None:
    assert lines(plan=plan) == []


@pytest.mark.parametrize("width", [1024, 2048, 4096, 8192])
def test_the_papers_own_widths(width: int) -> None:
    assert lines(plan="dyt", width=width) == []


SMALL = {"plan": "dyt", "width": 128, "heads": 4, "sites": {"final": "none"}, "init": InitConfig(std="fan_in")}
FAILURES: list[tuple[dict[str, Any], list[str]]] = [
    ({"plan": "identity"}, ["identity at attn_in, mlp_in, final", "another function"]),
    ({"plan": "dyt", "embedding_scale": "none"}, ["embedding of std 0.02", "--model.embedding_scale learned"]),
    ({"plan": "isru", "embedding_scale": "none"}, ["first isru", "--model.init.embedding_std 1"]),
    ({"plan": "llama", "sites": {"mlp_in": "dyt"}}, ["first dyt", "--model.embedding_scale learned"]),
    ({"plan": "dyt", "init": InitConfig(rule="fixup")}, ["start at zero", "--model.init.rule standard"]),
    ({"plan": "dyt", "residual": ResidualConfig(scheme="rezero")}, ["rezero", "--model.residual.initial 1"]),
    ({"plan": "dyt", "alpha": AlphaConfig(rule="constant")}, ["one alpha, 0.5", "--model.alpha.rule width"]),
    (SMALL | {"init": InitConfig()}, ["std 0.02 at width 128", "--model.init.std fan_in"]),
    (SMALL | {"init": InitConfig(), "width": 512}, ["std 0.02 at width 512", "--model.init.std fan_in"]),
    (SMALL | {"sites": {}}, ["dyt before the head of width 128", "--model.sites.final none"]),
]


@pytest.mark.parametrize(("changes", "parts"), FAILURES)
def test_a_failure_is_one_line_with_its_remedy(changes: dict[str, Any], parts: list[str]) -> None:
    (line,) = lines(**changes)
    assert "\n" not in line
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": "dyt", "embedding_scale": "none", "init": InitConfig(embedding_std=1.0)},
        {"plan": "dyt", "embedding_scale": "none", "alpha": AlphaConfig(rule="measured")},
        {"plan": "dyt", "embedding_scale": "none", "sites": {"embed": "rmsnorm"}},
        {"plan": "dyt", "init": InitConfig(rule="fixup"), "sites": {"attn_in": "rmsnorm", "mlp_in": "rmsnorm"}},
        {"plan": "dyt", "residual": ResidualConfig(scheme="rezero", initial=1.0)},
        {"plan": "dyt", "alpha": AlphaConfig(rule="constant"), "width": 1024},
        SMALL,
        SMALL | {"init": InitConfig(std=0.08)},
        SMALL | {"init": InitConfig(), "sites": {"attn_out": "rmsnorm", "mlp_out": "rmsnorm", "final": "none"}},
        SMALL | {"init": InitConfig(), "weights": "sigma"},
        {"plan": "llama", "width": 128, "heads": 4},
        {"plan": "fixup", "width": 128, "heads": 4},
    ],
)
def test_the_remedies_are_not_failures(changes: dict[str, Any]) -> None:
    assert lines(**changes) == []


def test_the_studys_arm_is_none() -> None:
    """configs/studies/tiny.yaml carries DyT over to width 128."""
    changes = ["--model.plan", "dyt", "--model.embedding_scale", "none", "--model.alpha.rule", "measured"]
    changes += ["--model.init.std", "fan_in", "--model.init.embedding_std", "1.0", "--model.sites.final", "none"]
    assert known_failures(load(CONFIGS / "tiny.yaml", changes).model) == []
