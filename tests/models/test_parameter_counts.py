"""Parameter counts of every size file under every plan, on the meta device, against counts made by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from models import PLANS, Transformer
from pretrain.cli import load

MODELS = Path(__file__).parents[2] / "configs" / "models"

# With the plan of the file itself, summed by hand:
#   gpt, no biases, tied:  V d + C d + L 12 d^2 + (2 L + 1) d
#   llama, untied:         2 V d + L (4 d^2 + 3 d f) + (2 L + 1) d
TOTALS = {
    "gpt-124m": 124_373_760,  # 38,633,472 + 786,432 + 12 * 7,077,888 + 25 * 768
    "gpt-774m": 773_582_080,  # 64,389,120 + 1,310,720 + 36 * 19,660,800 + 73 * 1280
    "gpt-1436m": 1_437_943_296,  # 77,266,944 + 1,572,864 + 48 * 28,311,552 + 97 * 1536
    "llama-1.3b": 1_345_423_360,  # 131,072,000 + 24 * (16,777,216 + 33,816,576) + 49 * 2048
    "llama-3b": 3_367_676_928,  # 196,608,000 + 28 * (37,748,736 + 75,497,472) + 57 * 3072
    "llama-7b": 6_738_415_616,  # 262,144,000 + 32 * (67,108,864 + 135,266,304) + 65 * 4096
    # 2 * 262,144 + 2 * (2 * 4,096 + 2 * 2,048 + 3 * 64 * 192) + 5 * 64, with 4,096 pieces
    "test-llama": 622_912,
    # 262,144 + 4,096 + 2 * (12 * 4,096 + 9 * 64 biases) + 5 * 2 * 64
    "test-gpt": 366_336,
}

# (depth L, width d, head width h, key and value width k, feed-forward width f)
SHAPES = {
    "gpt-124m": (12, 768, 64, 768, 3072),
    "gpt-774m": (36, 1280, 64, 1280, 5120),
    "gpt-1436m": (48, 1536, 64, 1536, 6144),
    "llama-1.3b": (24, 2048, 128, 2048, 5504),
    "llama-3b": (28, 3072, 128, 3072, 8192),
    "llama-7b": (32, 4096, 128, 4096, 11008),
    "test-llama": (2, 64, 16, 32, 192),
    "test-gpt": (2, 64, 16, 64, 256),
}


def norm_parameters(plan: str, gated: bool, depth: int, d: int, h: int, k: int, f: int) -> int:
    """Parameters at the norm sites, of residual schemes and of weights, and the embedding scale; LayerNorm without a
    shift."""
    elementwise = (depth * 2 + 1) * (d + 1) + 1  # gain, alpha; embedding scale
    linears = 7 if gated else 6
    rows = 2 * d + 2 * k + (2 if gated else 1) * f + d  # q and out, k and v, gate and up, down
    return {
        "none": 0,
        **dict.fromkeys(("hardtanh", "sigmoid", "softsign", "isru", "identity"), elementwise),
        "post": depth * 2 * d,
        "deepnorm": depth * 2 * d + 1,
        "mix-ln": depth * 2 * d + d,
        "hybridnorm": depth * (d + 3 * h) + d,
        "hybridnorm-star": depth * (d + 3 * h) + d + d,  # the first block has two norms of the stream, not one
        "rezero": depth + 1,
        "skipinit": depth * 2 + 1,
        "nf": depth * (2 + rows) + 1,
        "sigma-reparam": depth * linears + 1,
        "fixup": depth * (4 + 2) + 1 + 1,
        "t-fixup": 1,
        "llama": depth * 2 * d + d,
        "gpt": depth * 2 * d + d,
        "dyt": elementwise,
        "derf": (depth * 2 + 1) * (2 * d + 2) + 1,  # gain, beta, alpha, shift; embedding scale
        "dnt": depth * (3 * d + 2 * h) + 2 * d,
        "dnt-s1": depth * 2 * d + d,
        "dnt-s2": depth * (2 * d + 2 * h) + d,
        "dnt-s3": depth * (2 * d + 2 * h) + 2 * d,
        "dnt-s4": depth * (4 * d + 2 * h) + 2 * d,
        "peri": depth * 4 * d + 2 * d,
        "sandwich": depth * 4 * d + d,
        "sub-ln": depth * (3 * d + f) + d,
        "olmo2": depth * (2 * d + d + k) + d,
    }[plan]


def count(file: str, plan: str | None = None) -> int:
    config = load(MODELS / f"{file}.yaml").model
    config = dataclasses.replace(config, plan=plan or config.plan, vocab_size=config.vocab_size or 4096)
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def test_every_size_file_has_a_count_here() -> None:
    assert {path.stem for path in MODELS.glob("*.yaml")} == set(TOTALS) == set(SHAPES)


@pytest.mark.parametrize("file", TOTALS)
def test_the_file_as_it_is(file: str) -> None:
    assert count(file) == TOTALS[file]


@pytest.mark.parametrize("file", SHAPES)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(file: str, plan: str) -> None:
    shape = SHAPES[file]
    gated = "llama" in file
    own = norm_parameters("llama" if gated else "gpt", gated, *shape)
    layernorm_shifts = own if file == "test-gpt" else 0  # its biases are on
    without = TOTALS[file] - own - layernorm_shifts
    assert count(file, plan) == without + norm_parameters(plan, gated, *shape) + (
        layernorm_shifts if plan == "gpt" else 0
    )


@pytest.mark.parametrize("file", [file for file in TOTALS if not file.startswith("test-")])
def test_trained_on_twenty_tokens_a_parameter(file: str) -> None:
    tokens = load(MODELS / f"{file}.yaml").train.tokens
    assert tokens is not None
    assert abs(tokens / TOTALS[file] - 20) < 0.1
