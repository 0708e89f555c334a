"""Alphas beside the optimizer's step: their schedule, bounds and clip, by hand and under every engine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models import parameter_roles
from models.errors import ConfigError
from pretrain.__main__ import main
from pretrain.config import AlphaControlConfig, OptimizerConfig, RunConfig
from pretrain.counts import derive_counts
from pretrain.engines import build_engine
from pretrain.optimizers import alpha_factor
from pretrain.optimizers.alphas import multiplier
from pretrain.step import train_step
from tests.pretrain.engine_runs import advance, batch_of, config_of, here
from tests.pretrain.test_optimizers_guard import RefuseReadback
from tests.ranks import run_ranks
from tests.runs import checkpoint_tensors, curve, write_config

RAMP = AlphaControlConfig(multiplier=[0.5, 2.0], multiplier_steps=[1, 4])
FACTORS = [0.5, 0.5, 1.0, 1.5, 2.0, 2.0]  # of steps 0 to 5


def config_with(alpha: AlphaControlConfig, parallel: dict[str, Any] | None = None, **optimizer: Any) -> RunConfig:
    config = config_of("dyt", "msgdw", parallel=parallel or {}, train=optimizer.pop("train", {}))
    return replace(config, optimizer=replace(config.optimizer, alpha=alpha, **optimizer))


def started(config: RunConfig) -> Any:
    engine = build_engine(config, here())
    engine.initialize()
    return engine


def alphas(engine: Any) -> list[float]:
    """Whole, in the model's order, as a checkpoint has them."""
    roles = parameter_roles(engine.model)
    found = [value for name, value in engine.tensors()["model"].items() if roles[name] == "alpha"]
    return [(value.full_tensor() if isinstance(value, DTensor) else value).item() for value in found]


def test_the_multiplier_by_hand() -> None:
    assert [multiplier(step, RAMP) for step in range(6)] == FACTORS
    assert [alpha_factor(step, 6, RAMP) for step in range(6)] == [0.5, 1.0, 2.0, 1.5, 2.0 / 1.5, 1.0]
    assert [alpha_factor(step, 6, AlphaControlConfig()) for step in range(6)] == [1.0] * 6


def test_alphas_that_do_not_learn_follow_it() -> None:
    engine = started(config_with(RAMP, lr_factors={"alpha": 0.0}))
    first = alphas(engine)
    for step, factor in enumerate(FACTORS):
        advance(engine, engine._config, range(step, step + 1))
        assert alphas(engine) == pytest.approx([factor * alpha for alpha in first], rel=1e-6)  # fp32, some products


def test_alphas_that_learn_are_scaled_between_the_steps() -> None:
    """Bit for bit: the same training with the alphas multiplied by hand."""
    scheduled, plain = started(config_with(RAMP)), started(config_with(AlphaControlConfig()))
    roles = parameter_roles(plain.model)
    for step in range(6):
        for name, parameter in plain.model.named_parameters():
            if roles[name] == "alpha":
                parameter.data.mul_(FACTORS[step] / (FACTORS[step - 1] if step else 1.0))
        steps = range(step, step + 1)
        assert advance(scheduled, scheduled._config, steps) == advance(plain, plain._config, steps)
    assert alphas(scheduled) == alphas(plain)


def test_bounds_hold_after_every_step_and_scaling() -> None:
    bounds = AlphaControlConfig(multiplier=[1.0, 4.0], multiplier_steps=[1, 4], bounds=[0.35, 0.9])
    engine, free = started(config_with(bounds)), started(config_with(replace(bounds, bounds=None)))
    for step in range(6):
        advance(engine, engine._config, range(step, step + 1))
        assert all(0.35 <= alpha <= 0.9 for alpha in torch.tensor(alphas(engine)))
    advance(free, free._config, range(6))
    assert max(alphas(free)) > 0.9  # without them they leave


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_the_clip_is_of_all_alphas_together_and_of_nothing_else(clip: float) -> None:
    """One step of SGD without momentum or a clip of all gradients: what a parameter moves by is its gradient."""
    once = {"momentum": 0.0, "weight_decay": 0.0, "lr": 1.0, "train": {"clip": None}}
    moved: list[dict[str, Tensor]] = []
    norms = []
    for control in (AlphaControlConfig(), AlphaControlConfig(clip=clip)):
        engine = started(config_with(control, **once))
        before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        norms.append(advance(engine, engine._config, range(1))[0][1])
        moved.append({name: p.detach() - before[name] for name, p in engine.model.named_parameters()})
    roles = parameter_roles(engine.model)
    free, clipped = moved
    own = torch.cat([free[name] for name in free if roles[name] == "alpha"])
    share = min(1.0, clip / own.norm().item())
    assert (share < 1.0) == (clip < 1.0)
    for name, role in roles.items():
        # differences of fp32 numbers up to 1
        torch.testing.assert_close(
            clipped[name], free[name] * (share if role == "alpha" else 1.0), rtol=1e-3, atol=2e-7
        )
    others = torch.cat([free[name].flatten() for name in free if roles[name] != "alpha"]).norm()
    assert norms[1] == pytest.approx(torch.hypot(others, own.norm() * share).item(), rel=1e-4)  # told after the clip


def test_nothing_waits_for_the_device() -> None:
    control = replace(RAMP, bounds=[0.1, 0.9], clip=0.1)
    config = config_with(control, train={"skip_norm_sigma": 6.0, "skip_window": 4})
    engine, counts = started(config), derive_counts(config, 1)
    advance(engine, config, range(1))
    with RefuseReadback():
        for step in range(1, 4):
            train_step(engine, batch_of(step), step, config, counts, here(), 0)


ENGINES: dict[str, dict[str, Any]] = {
    "full": {},
    "hybrid": {"shard": "hybrid", "shard_size": 1},
    "offloaded": {"cpu_offload": True},
    **{f"ZeRO-{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "ZeRO-2, offloaded": {"engine": "deepspeed", "zero_stage": 2, "cpu_offload": True},
    "ZeRO-3, offloaded": {"engine": "deepspeed", "zero_stage": 3, "cpu_offload": True},
}
BOUNDED = replace(RAMP, bounds=[0.3, 0.9])


def under(names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        control = replace(BOUNDED, clip=0.02) if name in ("full", "ZeRO-0") else BOUNDED
        engine = started(config_with(control, ENGINES[name]))
        found[name] = (advance(engine, engine._config, range(6)), alphas(engine))
    return found


@pytest.mark.drill
def test_every_engine_does_the_same() -> None:
    expected = {}
    for control in (BOUNDED, replace(BOUNDED, clip=0.02)):
        engine = started(config_with(control))
        expected[control.clip] = (advance(engine, engine._config, range(6)), alphas(engine))
    assert expected[None][1] != pytest.approx(expected[0.02][1], rel=1e-4)
    for found in run_ranks(under, 2, list(ENGINES), timeout=250):
        for name, (steps, ends) in found.items():
            losses, values = expected[0.02 if name in ("full", "ZeRO-0") else None]
            assert steps == [pytest.approx(step, rel=1e-5) for step in losses], name  # sums in another order
            assert ends == pytest.approx(values, rel=1e-5), name


def test_a_resumed_run_goes_on_with_the_schedule(corpus: Path, tmp_path: Path) -> None:
    control = {"multiplier": [1.0, 0.5], "multiplier_steps": [5, 19], "bounds": [0.1, 2.0]}
    config = write_config(
        tmp_path, corpus, {"model": {"plan": "dyt"}, "optimizer": {"alpha": control}, "checkpoint": {"every": 10}}
    )
    assert main([str(config)]) == 0
    whole, part = tmp_path / "runs/small", tmp_path / "part/small"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints/step-00000020")
    assert main([str(config), "--runs_dir", str(part.parent)]) == 0
    assert curve(part) == curve(whole)
    there, again = (checkpoint_tensors(run / "checkpoints/step-00000020") for run in (whole, part))
    assert all(torch.equal(again[key], value) for key, value in there.items() if isinstance(value, Tensor))


@pytest.mark.parametrize(
    ("control", "says"),
    [
        ({"multiplier": [1.0, 2.0]}, "go together"),
        ({"multiplier_steps": [1, 2]}, "go together"),
        ({"multiplier": [0.0, 2.0], "multiplier_steps": [1, 2]}, "two numbers above 0"),
        ({"multiplier": [1.0], "multiplier_steps": [1, 2]}, "two numbers above 0"),
        ({"multiplier": [1.0, 2.0], "multiplier_steps": [2, 2]}, "the later one last"),
        ({"multiplier": [1.0, 2.0], "multiplier_steps": [2, 30]}, "the last step of this run is 29"),
        ({"bounds": [1.0, 0.5]}, "the lower one first"),
        ({"bounds": [1.0]}, "the lower one first"),
        ({"clip": 0.0}, r"optimizer\.alpha\.clip is 0"),
    ],
)
def test_mistakes_are_one_line(control: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        alpha_factor(0, 30, AlphaControlConfig(**control))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("control", [{"clip": 1.0}, {"bounds": [0.0, 1.0]}])
def test_a_model_without_alphas_is_a_mistake(control: dict[str, Any]) -> None:
    config = replace(config_of("dnt"), optimizer=OptimizerConfig(alpha=AlphaControlConfig(**control)))
    with pytest.raises(ConfigError, match="role alpha, and this model has none"):
        build_engine(config, here())


def test_where_the_clip_cannot_be_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.alpha\.clip with parallel\.zero_stage 1"):
        build_engine(config_with(AlphaControlConfig(clip=1.0), {"engine": "deepspeed", "zero_stage": 1}), here())
