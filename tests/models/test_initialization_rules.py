"""First weights by the rules of papers: the spread of every matrix against their formulas, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models import ModelConfig
from models.config import InitConfig
from tests.models.building import build, tiny
from tests.models.test_initialization import close

D, KV, F, L, V = 64, 32, 128, 8, 301  # width, key and value width, feed-forward width, depth, vocabulary


def roomy(plan: str, **changes: object) -> ModelConfig:
    return tiny(plan=plan, width=D, heads=4, kv_heads=2, ffn_width=F, depth=L, vocab_size=V, **changes)


def matrices(config: ModelConfig) -> dict[str, Tensor]:
    """Kind -> the matrices of all blocks together, or of embedding and head."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in build(config).named_parameters():
        if parameter.ndim == 2:
            found.setdefault(".".join(name.split(".")[2:-1]) or name.split(".")[0], []).append(parameter.detach())
    return {name: torch.cat([tensor.flatten() for tensor in tensors]) for name, tensors in found.items()}


def xavier(rows: int, columns: int) -> float:
    return math.sqrt(2 / (rows + columns))


BRANCHES = 2 * L
PACKED = xavier(D + 2 * KV, D)  # query, key and value as one matrix
T = 0.67 * L**-0.25
BETA = (8 * L) ** -0.25
GAMMA = math.sqrt(math.log(2 * L))
RULES: dict[str, dict[str, float]] = {
    "fixup": {
        "embedding": D**-0.5,
        "attention.q": PACKED * BRANCHES ** (-1 / 6),
        "attention.k": PACKED * BRANCHES ** (-1 / 6),
        "attention.v": PACKED * BRANCHES ** (-1 / 6),
        "attention.out": 0,
        "feedforward.gate": xavier(F, D),
        "feedforward.up": xavier(F, D) * BRANCHES**-0.5,
        "feedforward.down": 0,
        "head": 0,
    },
    "t-fixup": {
        "embedding": D**-0.5 * (9 * L) ** -0.25,
        "attention.q": xavier(D, D) / math.sqrt(2),
        "attention.k": xavier(KV, D) / math.sqrt(2),
        "attention.v": xavier(KV, D) * T,
        "attention.out": xavier(D, D) * T,
        "feedforward.gate": xavier(F, D),
        "feedforward.up": xavier(F, D) * T,
        "feedforward.down": xavier(D, F) * T,
        "head": D**-0.5,
    },
    "deepnorm": {
        "embedding": D**-0.5,
        "attention.q": xavier(D, D),
        "attention.k": xavier(KV, D),
        "attention.v": xavier(KV, D) * BETA,
        "attention.out": xavier(D, D) * BETA,
        "feedforward.gate": xavier(F, D),
        "feedforward.up": xavier(F, D) * BETA,
        "feedforward.down": xavier(D, F) * BETA,
        "head": D**-0.5,
    },
    "magneto": {
        "embedding": 0.02,
        "attention.q": xavier(D, D),
        "attention.k": xavier(KV, D),
        "attention.v": xavier(KV, D) * GAMMA,
        "attention.out": xavier(D, D) * GAMMA,
        "feedforward.gate": xavier(F, D),
        "feedforward.up": xavier(F, D) * GAMMA,
        "feedforward.down": xavier(D, F) * GAMMA,
        "head": 0.02,
    },
    "torch": {
        "embedding": D**-0.5,
        **dict.fromkeys(("attention.q", "attention.k", "attention.v", "attention.out"), (3 * D) ** -0.5),
        **dict.fromkeys(("feedforward.gate", "feedforward.up", "head"), (3 * D) ** -0.5),
        "feedforward.down": (3 * F) ** -0.5,
    },
}
PLANS = {
    "fixup": "fixup",
    "t-fixup": "t-fixup",
    "deepnorm": "deepnorm",
    "sub-ln": "magneto",
    **dict.fromkeys(("rezero", "skipinit", "nf", "sigma-reparam"), "torch"),
}


def check(found: dict[str, Tensor], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, std in expected.items():
        assert not found[name].any() if std == 0 else close(found[name], std), (name, found[name].std().item(), std)


@pytest.mark.parametrize("plan", PLANS)
def test_plans_bring_their_rule(plan: str) -> None:
    check(matrices(roomy(plan)), RULES[PLANS[plan]])


@pytest.mark.parametrize("rule", RULES)
def test_any_plan_takes_any_rule(rule: str) -> None:
    check(matrices(roomy("llama", init=InitConfig(rule=rule))), RULES[rule])  # type: ignore[arg-type]


@pytest.mark.parametrize("distribution", ["normal", "trunc_normal", "uniform"])
def test_zero_is_zero_from_any_distribution(distribution: str) -> None:
    found = matrices(roomy("fixup", init=InitConfig(distribution=distribution)))  # type: ignore[arg-type]
    assert not found["attention.out"].any()
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_uniform_has_the_same_spread_and_its_bounds() -> None:
    """xavier_uniform is uniform within sqrt(6 / (rows + columns)); nn.Linear's within 1/sqrt(columns)."""
    found = matrices(roomy("fixup", init=InitConfig(distribution="uniform")))
    check(found, RULES["fixup"])
    bound = math.sqrt(6 / (F + D)) * BRANCHES**-0.5
    assert 0.999 * bound < found["feedforward.up"].abs().max() <= bound * (1 + 1e-6)
    found = matrices(roomy("rezero", init=InitConfig(distribution="uniform")))
    assert 0.999 * F**-0.5 < found["feedforward.down"].abs().max() <= F**-0.5 * (1 + 1e-6)


def test_what_is_written_out_goes_before_the_rule() -> None:
    init = InitConfig(embedding_std=0.5, head_std=0.25)
    check(matrices(roomy("fixup", init=init)), RULES["fixup"] | {"embedding": 0.5, "head": 0.25})


def test_the_head_of_magneto_is_as_wide_as_the_matrices_of_the_standard_rule() -> None:
    found = matrices(roomy("sub-ln", init=InitConfig(std="fan_in")))
    check(found, RULES["magneto"] | {"head": D**-0.5})


def test_gpt_has_no_gate_and_a_tied_head() -> None:
    """GELU's linear takes what ReLU's has in the papers; the head is the embedding, for Fixup too."""
    found = matrices(roomy("fixup", trunk="gpt", context=128))
    expected = {name: std for name, std in RULES["fixup"].items() if name not in ("feedforward.gate", "head")}
    check(found, expected | {"positions": D**-0.5})
