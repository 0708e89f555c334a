"""A run that looks inside itself: right figures at the right steps, and not a bit of what is trained is changed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import ConfigError
from models.norms import build_norm
from pretrain.cli import build, parse_overrides
from pretrain.config import INSPECTED, LogConfig, RunConfig
from pretrain.counts import derive_counts
from pretrain.distributed import World
from pretrain.engines import build_engine
from pretrain.engines.combinations import unheeded, uninspectable
from pretrain.telemetry.activations import record_outliers
from pretrain.telemetry.inspection import Inspection
from pretrain.telemetry.sites import record_saturation
from pretrain.telemetry.statistics import outliers
from tests.pretrain.engine_runs import batch_of, config_of, here
from tests.runs import metrics
from tests.tools.small_run import prepare_small, small_config, train_small

FORWARD = {"alpha", "inverse_std", "saturated", "attention_entropy"}
FORWARD |= {"outliers_over_6", "outliers_kurtosis", "outliers_max_median"}
STEP = {"grad_kurtosis", "grad_hill", "grad_q999_q50", "update_ratio"}
NOISE = {"noise_scale", "noise_gradient_squared", "noise_covariance_trace"}
CLOCK = {"tokens_per_second", "mfu", "data_share", "memory_gb"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("inspection")
    config = small_config(folder, prepare_small(folder))
    model = replace(config.model, plan="dyt", dropout=0.1)
    return replace(config, model=model, train=replace(config.train, steps=5))


def inspected(
    config: RunConfig, name: str, every: int, kinds: list[str] | None = None, log_every: int = 1
) -> RunConfig:
    return replace(config, name=name, log=LogConfig(log_every, False, every, kinds))


def kinds_of(record: dict[str, Any]) -> set[str]:
    return {key.split("/")[0] for key in record} & (FORWARD | STEP | NOISE)


def test_observation_changes_nothing_and_stands_at_its_steps(config: RunConfig) -> None:
    """Losses, weights and dropout's generator are the same bits; validation at the end shows alphas in any case."""
    plain, plain_run = train_small(inspected(config, "plain", 0))
    weights = {name: p.clone() for name, p in plain.engine.model.state_dict().items()}
    state = torch.get_rng_state()
    looked, run = train_small(inspected(config, "looked", 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in looked.engine.model.state_dict().items():
        assert torch.equal(p, weights[name]), name
    for expected, found in zip(metrics(plain_run), metrics(run), strict=True):
        assert {k: found[k] for k in expected if k not in CLOCK} == {k: expected[k] for k in expected if k not in CLOCK}
    everything = FORWARD | STEP | NOISE
    ends = {"alpha", "inverse_std"}
    assert [kinds_of(record) for record in metrics(run)] == [set(), everything, set(), everything, ends]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in looked.engine.model.modules())


def test_only_what_is_asked_for_between_lines_of_the_log(config: RunConfig) -> None:
    _, run = train_small(inspected(config, "some", 3, ["attention", "updates"], log_every=0))
    records = metrics(run)
    assert [record["step"] for record in records] == [3, 5]
    assert kinds_of(records[0]) == {"attention_entropy", "update_ratio"}
    assert "loss" not in records[0]
    assert 0 < records[0]["attention_entropy/blocks.0"] < math.log(32)


def test_what_is_not_finite_is_null(config: RunConfig) -> None:
    """A single number varies not at all; a gradient of the embedding is mostly 0, and its median makes no ratio."""
    _, run = train_small(inspected(config, "null", 2, ["gradients"]))
    line = (run / "metrics.jsonl").read_text().splitlines()[1]
    record = json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
    assert record["grad_kurtosis/embedding.weight"] > 3
    assert all(value is None or math.isfinite(value) for key, value in record.items() if key.startswith("grad_"))


def test_figures_reach_tensorboard(config: RunConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = inspected(config, "board", 5, ["saturation"])
    _, run = train_small(replace(one, log=replace(one.log, tensorboard=True)))
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    (event,) = board.Scalars("saturated/blocks.1.mlp_in")
    assert event.step == 5
    assert event.value == pytest.approx(metrics(run)[4]["saturated/blocks.1.mlp_in"])


def model_of(*norms: nn.Module) -> nn.Sequential:
    return nn.Sequential(*norms)


@pytest.mark.parametrize(
    ("function", "reaches"),
    [
        ("dyt", math.atanh(0.95)),
        ("hardtanh", 0.95),
        ("sigmoid", 2 * math.atanh(0.95)),
        ("logistic", 2 * math.atanh(0.95)),  # between 0 and 1: 0.975 at one end, 0.025 at the other
        ("softsign", 19.0),
        ("isru", 0.95 / math.sqrt(1 - 0.95**2)),
    ],
)
def test_saturation_is_what_lies_beyond_95_percent_of_the_range(function: str, reaches: float) -> None:
    norm = build_norm(function, 2, {"eps": 1e-5}, "attn_in")
    with torch.no_grad():
        norm.alpha.fill_(0.5)
        norm.weight.fill_(7.0)  # saturation is before the gain
    z = torch.tensor([[-1.01, -0.99], [1.01, 0.5]]) * reaches
    model = model_of(norm)
    with record_saturation(model) as found:
        model(z / 0.5)
    assert found["0"] == 0.5
    assert not norm._forward_pre_hooks


def test_what_is_unbounded_or_no_function_has_no_saturation() -> None:
    model = model_of(
        build_norm("identity", 2, {"eps": 1e-5}, "final"), build_norm("rmsnorm", 2, {"eps": 1e-5}, "final")
    )
    with record_saturation(model) as found:
        model(torch.ones(1, 2))
    assert found == {}


def test_a_shift_and_a_fixed_alpha_count() -> None:
    norm = build_norm("dyt", 1, {"eps": 1e-5, "alpha": 2.0, "shift": True}, "final")
    with torch.no_grad():
        norm.shift.fill_(-3.0)
    model = model_of(norm)
    with record_saturation(model) as found:
        model(torch.tensor([[0.0], [1.5], [2.0], [4.0]]))  # z = -3, 0, 1, 5
    assert found["0"] == 0.5


def test_outliers_of_the_stream_and_of_every_site() -> None:
    config = config_of()
    engine = build_engine(config, here())
    engine.initialize()
    streams: dict[str, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(lambda m, i, out, n=f"blocks.{k}": streams.__setitem__(n, out))
        for k, block in enumerate(engine.model.get_submodule("blocks").children())
    ]
    tokens = batch_of(0)[:, :-1]
    with record_outliers(engine.model) as found:
        engine.model(tokens)
    for handle in handles:
        handle.remove()
    sites = {f"blocks.{k}.{site}" for k in range(3) for site in ("attn_in", "attn_out", "mlp_out")}
    sites |= {f"blocks.{k}.attention.{site}" for k in range(3) for site in ("query", "key")}
    assert set(found) == sites | set(streams) | {"embed", "final"}
    for name, stream in streams.items():
        assert found[name] == outliers(stream)
    assert found["final"] == found["blocks.2"]
    assert found["blocks.1.attn_in"] == found["blocks.0"]


def described(sections: dict[str, Any], world: World) -> list[str]:
    config = config_of(**sections)
    return Inspection(config, derive_counts(config, world.size), None, world, 0).describe()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sections", "size", "out"),
    [
        ({"train": {"micro_batch": 2}}, 1, {}),
        ({}, 1, {"noise": "the whole batch"}),
        ({"train": {"micro_batch": 2}}, 2, {}),
        ({"train": {"micro_batch": 2}, "parallel": {"shard": "grad_op"}}, 2, {"noise": "--parallel.shard full"}),
        ({"train": {"micro_batch": 2}, "parallel": {"shard": "grad_op"}}, 1, {}),
        ({"parallel": {"engine": "deepspeed", "zero_stage": 0}}, 2, {"noise": "--parallel.engine fsdp"}),
        (
            {"parallel": {"engine": "deepspeed", "zero_stage": 1}},
            2,
            {"noise": "buffers", "gradients": "flat pieces", "updates": "flat pieces"},
        ),
    ],
)
def test_what_cannot_be_had_is_told_and_left_out(sections: dict[str, Any], size: int, out: dict[str, str]) -> None:
    world = World(0, size, torch.device("cpu"))
    lines = described({**sections, "log": {"inspect_every": 7}}, world)
    kinds = [kind for kind in INSPECTED if kind not in out]
    assert lines[0] == f"every 7 steps inspected: {', '.join(kinds)}"
    assert len(lines) == 1 + len(out)
    for kind, why in out.items():
        assert any(f"log.inspect {kind} is left out" in line and why in line for line in lines)
    assert described({**sections, "log": {"inspect_every": 0}}, world) == []


@pytest.mark.parametrize("kind", ["gradients", "updates", "noise"])
def test_what_cannot_be_had_is_refused_where_it_is_named(kind: str) -> None:
    sections = {"parallel": {"engine": "deepspeed", "zero_stage": 2}}
    named = config_of(**sections, log={"inspect_every": 5, "inspect": ["alpha", kind]})
    with pytest.raises(ConfigError, match=f"log.inspect {kind} with parallel") as error:
        build_engine(named, here())
    assert "\n" not in str(error.value)
    assert kind in uninspectable(config_of(**sections), here())
    idle = config_of(**sections, log={"inspect": [kind]})
    assert "log.inspect does nothing where log.inspect_every is 0" in unheeded(idle, here())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--log.inspect_every", "-1"], "log.inspect_every is -1: write a number of steps, or 0 for never"),
        (["--log.inspect", "[atention]"], "log.inspect: there is no 'atention'; did you mean 'attention'?"),
    ],
)
def test_mistakes_are_named(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(parse_overrides(["--train.steps", "1", *arguments]), "here")
    assert says in str(error.value)


def test_inspection_is_off_by_default(tmp_path: Path) -> None:
    assert RunConfig(train=config_of().train).log.inspect_every == 0
    assert described({}, here()) == []
