"""A step's gradients and updates: by hand and by scipy on one process, and the same on two, however they share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from models import parameter_roles
from pretrain.batch import Batch, make_batch
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.counts import derive_counts
from pretrain.engines import build_engine
from pretrain.engines.protocol import Engine
from pretrain.step import train_step
from pretrain.telemetry.sites import numbers
from pretrain.telemetry.statistics import sample, stride, tail
from pretrain.telemetry.step_watch import StepWatch, _placed_sample
from tests.pretrain.engine_runs import batch_of, config_of, here
from tests.ranks import run_ranks

ALL = ("gradients", "updates", "noise")


def built(config: RunConfig) -> Engine:
    torch.manual_seed(0)
    engine = build_engine(config, here())
    engine.initialize()
    return engine


def watched(config: RunConfig, kinds: tuple[str, ...] = ALL, engine: Engine | None = None) -> dict[str, float]:
    """Of the third step of a training."""
    engine = built(config) if engine is None else engine
    world, counts = here(), derive_counts(config, here().size)
    watch = None
    for step in range(3):
        watch = StepWatch(engine, world, kinds) if step == 2 else None
        train_step(engine, batch_of(step)[world.rank :: world.size], step, config, counts, world, 0, watch)
    assert watch is not None
    return numbers(watch.results())


def test_figures_of_gradients_are_those_of_whole_tensors() -> None:
    from scipy.stats import kurtosis

    config = config_of()
    engine = built(config)
    batch = make_batch(batch_of(0), 0, False)
    roles, named = parameter_roles(engine.model), dict(engine.model.named_parameters())
    objective, _ = engine.model(batch.inputs, batch.targets)
    gradients = dict(zip(named, torch.autograd.grad(objective, list(named.values())), strict=True))
    watch = StepWatch(engine, here(), ["gradients"])
    train_step(engine, batch_of(0), 0, config, derive_counts(config, 1), here(), 0, watch)
    found = numbers(watch.results())
    weights = [name for name in named if roles[name] in ("matrix", "embedding", "head")]
    assert set(found) == {f"{kind}/{n}" for kind in ("grad_kurtosis", "grad_hill", "grad_q999_q50") for n in weights}
    for name in weights:  # gradients in fp32, scaled by 1/128 exactly
        expected = kurtosis(gradients[name].double().flatten().numpy(), fisher=False)
        assert found[f"grad_kurtosis/{name}"] == pytest.approx(expected, rel=1e-6)
        heavy = tail(sample(gradients[name]))
        assert found[f"grad_hill/{name}"] == pytest.approx(heavy.hill.item(), rel=1e-6, nan_ok=True)
        assert found[f"grad_q999_q50/{name}"] == pytest.approx(heavy.ratio.item(), rel=1e-6, nan_ok=True)


def test_the_update_of_plain_sgd_is_lr_times_the_gradient() -> None:
    plain = OptimizerConfig(name="msgdw", lr=0.1, momentum=0.0, weight_decay=0.0)
    config = replace(config_of("dyt", schedule={"name": "constant"}, train={"clip": None}), optimizer=plain)
    engine = built(config)
    batch = make_batch(batch_of(0), 0, False)
    named = dict(engine.model.named_parameters())
    objective, _ = engine.model(batch.inputs, batch.targets)
    gradients = torch.autograd.grad(objective / batch.targets.numel(), list(named.values()))
    expected = {
        f"update_ratio/{name}": pytest.approx((0.1 * g.norm() / p.norm()).item(), rel=1e-3, abs=1e-7)  # fp32's steps
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }
    watch = StepWatch(engine, here(), ["updates"])
    train_step(engine, batch_of(0), 0, config, derive_counts(config, 1), here(), 0, watch)
    found = numbers(watch.results())
    assert found == expected
    assert found["update_ratio/blocks.0.attn_in.alpha"] > 0


def test_a_step_left_out_has_no_ratio() -> None:
    config = config_of(train={"skip_norm_sigma": 6.0})
    engine = built(config)
    handle = next(engine.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    watch = StepWatch(engine, here(), ["updates", "gradients"])
    train_step(engine, batch_of(0), 0, config, derive_counts(config, 1), here(), 0, watch)
    handle.remove()
    found = numbers(watch.results())
    assert all(value != value for key, value in found.items() if key.startswith("update_ratio/"))
    assert found["grad_kurtosis/embedding.weight"] != found["grad_kurtosis/embedding.weight"]
    assert found["grad_kurtosis/blocks.0.attention.q.weight"] > 1


SHARED: dict[str, dict[str, Any]] = {
    "full": {},
    "grad_op": {"shard": "grad_op"},
    "hybrid": {"shard": "hybrid", "shard_size": 1},
    "replicate": {"shard": "replicate"},
    "ZeRO-0": {"engine": "deepspeed", "zero_stage": 0},
}


def watched_all() -> dict[str, dict[str, float]]:
    found = {}
    for name, parallel in SHARED.items():
        kinds = ALL if name == "full" else ALL[:2]
        found[name] = watched(config_of("dyt", parallel=parallel, train={"micro_batch": 2}), kinds)
    return found


def test_two_ranks_see_what_one_does() -> None:
    """The first micro-batches of two ranks hold the sequences of one process's first of twice the size."""
    alone = watched(config_of("dyt", train={"micro_batch": 4}))
    for found in run_ranks(watched_all, 2, timeout=120):
        for name, figures in found.items():
            expected = {key: value for key, value in alone.items() if name == "full" or not key.startswith("noise")}
            # gradients agree within 1e-5 (test_engine_parity.py); the Hill index divides by a small mean of logarithms
            assert figures == {key: pytest.approx(value, rel=1e-3, abs=1e-7) for key, value in expected.items()}, name


class Holder:
    """As much of an engine as is watched: one linear, whose weight of one row is on rank 0 alone."""

    def __init__(self) -> None:
        mesh = init_device_mesh("cpu", (2,))
        weight = torch.arange(1.0, 9.0).reshape(1, 8)
        self.model = nn.Linear(8, 1, bias=False)
        self.model.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        self.model.weight.grad = distribute_tensor(weight.square(), mesh, [Shard(0)])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)


def placed() -> torch.Tensor:
    """The two ranks' parts, of 3 and 2 rows, of a sample of every fifth element."""
    rows = torch.arange(1.0, 41.0).reshape(5, 8)
    parameter = nn.Parameter(distribute_tensor(rows, init_device_mesh("cpu", (2,)), [Shard(0)]))
    with patch("pretrain.telemetry.step_watch.stride", lambda shape: stride(shape, 10)):
        return here().sum(_placed_sample(parameter, parameter.detach().to_local()))


def test_a_sample_is_the_same_however_rows_are_shared() -> None:
    whole = torch.arange(1.0, 41.0).reshape(5, 8)
    assert stride(whole.shape, 10) == 5  # 4 has a factor in common with the rows
    for found in run_ranks(placed, 2):
        assert torch.equal(found, sample(whole, 10))


def with_an_empty_shard() -> tuple[int, dict[str, float]]:
    engine: Any = Holder()
    watch = StepWatch(engine, here(), ALL)
    batch = Batch(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64), None)
    watch.accumulated(batch, first=True, last=False)
    engine.model.weight.grad *= 1.5
    watch.accumulated(batch, first=False, last=True)
    engine.optimizer.step()
    watch.updated()
    return engine.model.weight.to_local().numel(), numbers(watch.results())


def test_empty_shards_count_for_nothing() -> None:
    (most, found), (least, other) = run_ranks(with_an_empty_shard, 2)
    assert (most, least) == (8, 0)
    assert found == other
    squares = torch.arange(1.0, 9.0).square()
    size = squares.norm().item()
    assert found["update_ratio/weight"] == pytest.approx(1.5 * size / squares.sum().sqrt().item())
    deviations = squares - squares.mean()
    expected = (deviations**4).mean() / (deviations**2).mean() ** 2
    assert found["grad_kurtosis/weight"] == pytest.approx(expected.item(), rel=1e-5)
    # 8 targets in the part, 16 in the whole: mean gradients 2 g and 1.5 g
    assert found["noise_gradient_squared"] == pytest.approx((16 * 2.25 - 8 * 4) / 8 * size**2)
    assert found["noise_covariance_trace"] == pytest.approx((4 - 2.25) / (1 / 8 - 1 / 16) * size**2)
