"""Initialization on 2 and 4 gloo ranks under fully_shard gives, gathered, what one process has, bit for bit."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models import Transformer
from models.initialization import initialize, measure_alpha
from tests.models.building import build, tiny, tokens
from tests.ranks import run_ranks

# 61 pieces and a feed-forward of 40 do not divide by 4 ranks, and an alpha of shape (1,) leaves all but one rank empty.
CONFIG = tiny(plan="derf", sites={"query": "dyt", "mlp_out": "dyt"}, kv_heads=2)


def fingerprints(model: nn.Module) -> dict[str, str]:
    found = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name] = hashlib.sha256(whole.detach().numpy().tobytes()).hexdigest()
    return found


def sharded(reshard: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = Transformer(CONFIG)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    model.to_empty(device="cpu")
    initialize(model, CONFIG, seed=5)
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
