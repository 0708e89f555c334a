"""Initialization on 2 and 4 gloo ranks under fully_shard gives, gathered, what one process has, bit for bit."""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models import ModelConfig, Transformer
from models.config import InitConfig
from models.initialization import initialize, measure_alpha
from tests.models.building import build, tiny, tokens
from tests.ranks import run_ranks

# 61 pieces and a feed-forward of 40 do not divide by 4 ranks, and an alpha of shape (1,) leaves all but one rank empty.
CONFIG = tiny(plan="derf", sites={"query": "dyt", "mlp_out": "dyt"}, kv_heads=2)
PLANS = ["fixup", "t-fixup", "deepnorm", "rezero", "nf", "sigma-reparam", "hybridnorm-star"]


def fingerprints(model: nn.Module) -> dict[str, str]:
    found = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name] = hashlib.sha256(whole.detach().numpy().tobytes()).hexdigest()
    return found


def shard(config: ModelConfig, reshard: bool) -> Transformer:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = Transformer(config)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    model.to_empty(device="cpu")
    initialize(model, config, seed=5)
    return model


def sharded(reshard: bool) -> dict[str, Any]:
    model = shard(CONFIG, reshard)
    empty = sum(p.to_local().numel() == 0 for p in model.parameters() if isinstance(p, DTensor))
    started = fingerprints(model)
    measured = measure_alpha(model, lambda: model(tokens()), 0.5)
    model(tokens(), tokens(seed=1))[0].backward()  # parameters are sharded again after it
    after = {name: p.full_tensor().item() for name, p in model.named_parameters() if name.endswith(".alpha")}
    return {"started": started, "empty": empty, "measured": measured, "alphas": after}


@cache
def alone() -> tuple[dict[str, str], dict[str, float]]:
    model = build(CONFIG, seed=5)
    return fingerprints(model), measure_alpha(model, lambda: model(tokens()), 0.5)


@pytest.mark.parametrize(("world_size", "reshard"), [(2, True), (4, False)])
def test_world_size_changes_no_bit(world_size: int, reshard: bool) -> None:
    started, measured = alone()
    ranks = run_ranks(sharded, world_size, reshard, timeout=90)
    assert ranks[-1]["empty"] > 0, "no shard was empty: the test does not test what it says"
    for rank in ranks:
        assert rank["started"] == started
        assert rank["measured"] == pytest.approx(measured, rel=1e-6)  # gathered weights are laid out alike
        assert rank["alphas"] == pytest.approx({f"{name}.alpha": value for name, value in measured.items()}, rel=1e-6)


def first_steps(plan: str, distribution: str) -> ModelConfig:
    return tiny(plan=plan, kv_heads=2, init=InitConfig(distribution=distribution))  # type: ignore[arg-type]


def all_plans() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for plan, distribution in product(PLANS, ("normal", "uniform")):
        model = shard(first_steps(plan, distribution), reshard=True)
        found[f"{plan} {distribution}"] = fingerprints(model), model(tokens(), tokens(seed=1))[1].item()
    return found


def test_rules_and_schemes_too() -> None:
    """The same weights, and the same loss up to the order of sums, though weights are whole only inside a forward."""
    for rank in run_ranks(all_plans, 4, timeout=150):
        for plan, distribution in product(PLANS, ("normal", "uniform")):
            model = build(first_steps(plan, distribution), seed=5)
            started, loss = rank[f"{plan} {distribution}"]
            assert started == fingerprints(model), plan
            assert loss == pytest.approx(model(tokens(), tokens(seed=1))[1].item(), rel=1e-6), plan
