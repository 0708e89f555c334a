"""What goes together (docs/combinations.md), and the pairs that are refused with their reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from models.errors import ConfigError
from pretrain.batch import make_batch
from pretrain.config import RunConfig
from pretrain.distributed import World
from pretrain.engines import build_engine
from pretrain.engines.combinations import unheeded
from pretrain.engines.compiling import missing_compiler
from pretrain.engines.mesh import shard_size
from tests.grids import surveyed
from tests.pretrain.engine_runs import advance, batch_of, config_of, here, train, train_all
from tests.ranks import run_ranks

FP32 = 1e-5  # as in test_engine_parity.py
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "full": {"activation_checkpointing": "full"},
    "selective operations": {"activation_checkpointing": "selective"},
    "every second block": {"activation_checkpointing": "selective", "checkpoint_every_block": 2},
}
PARALLEL: dict[str, dict[str, Any]] = {
    "full": {},
    "grad_op": {"shard": "grad_op"},
    "hybrid": {"shard": "hybrid", "shard_size": 1},
    "replicate": {"shard": "replicate"},
    **{f"ZeRO-{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
GPU = World(0, 1, torch.device("cuda"))
GRAPHS = {"compile": True, "cuda_graphs": True}


@pytest.fixture(scope="module")
def plain() -> dict[Any, Any]:
    return {plan: train(config_of(plan), 5) for plan in ("dnt", "dyt")}


def saved_bytes(config: RunConfig) -> int:
    """Of all storages that autograd keeps from the forward for the backward, parameters left out."""
    engine = build_engine(config, here())
    engine.initialize()
    own = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        objective, _ = engine.model(*make_batch(batch_of(0), 0, False)[:2])
    assert objective.requires_grad
    return sum(kept.values())


def test_checkpointing_keeps_less() -> None:
    """full < selective < none, and every second block lies between full and none."""
    sizes = {name: saved_bytes(config_of(train=train)) for name, train in CHECKPOINTING.items()}
    none = saved_bytes(config_of())
    assert sizes["full"] < 0.3 * none
    assert sizes["full"] < sizes["every second block"] < 0.7 * none
    # what a selective block keeps for itself escapes these hooks
    assert sizes["selective operations"] < none


def checkpointed(parallel: dict[str, Any]) -> dict[Any, RunConfig]:
    return {
        (name, plan): config_of(plan, train=train, parallel=parallel)
        for name, train in CHECKPOINTING.items()
        for plan in ("dnt", "dyt")
    }


def test_checkpointing_changes_no_bit_alone(plain: dict[Any, Any]) -> None:
    """With dropout too: the recomputation draws what the forward drew."""
    for (name, plan), config in checkpointed({}).items():
        assert train(config, 5) == plain[plan], name
    noisy = {"dropout": 0.2}
    kept = train(config_of(model=noisy), 3)
    assert train(config_of(model=noisy, train=CHECKPOINTING["full"]), 3) == kept


@pytest.mark.drill
@pytest.mark.parametrize("mode", surveyed(PARALLEL, ("full", "hybrid", "ZeRO-3")))
def test_checkpointing_under_every_engine(mode: str, plain: dict[Any, Any]) -> None:
    for found in run_ranks(train_all, 2, checkpointed(PARALLEL[mode]), 5, timeout=200):
        for (name, plan), steps in found.items():
            assert steps == [pytest.approx(step, rel=FP32) for step in plain[plan]], (name, plan)


@contextmanager
def traced_only() -> Iterator[None]:
    """Blocks compile by aot_eager: the same tracing and autograd as inductor's, without C++ to build."""
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True))
        yield


def train_compiled(configs: dict[Any, RunConfig], steps: int) -> dict[Any, Any]:
    with traced_only():
        return train_all(configs, steps)


def compiled(parallel: dict[str, Any], *checkpointing: str) -> dict[Any, RunConfig]:
    kinds: dict[str, dict[str, Any]] = {name: CHECKPOINTING[name] for name in checkpointing} or {"none": {}}
    return {
        (name, plan): config_of(plan, train={"compile": True, **train}, parallel=parallel)
        for name, train in kinds.items()
        for plan in ("dnt", "dyt")
    }


@pytest.mark.drill
@pytest.mark.parametrize("mode", surveyed([mode for mode in PARALLEL if mode != "ZeRO-3"], ("full", "ZeRO-2")))
def test_compiled_under_every_engine(mode: str, plain: dict[Any, Any]) -> None:
    both = ("full", "selective operations") if mode in ("full", "ZeRO-2") else ()
    configs = compiled(PARALLEL[mode]) | (compiled(PARALLEL[mode], *both) if both else {})
    for found in run_ranks(train_compiled, 2, configs, 5, timeout=280):
        for (name, plan), steps in found.items():
            # norms decomposed, sums in another order; as test_engine.py has it
            assert steps == [pytest.approx(step, rel=1e-4) for step in plain[plan]], (name, plan)


def test_compiled_and_checkpointed_alone(plain: dict[Any, Any]) -> None:
    for (name, plan), steps in train_compiled(compiled({}, *CHECKPOINTING), 5).items():
        assert steps == [pytest.approx(step, rel=1e-4) for step in plain[plan]], (name, plan)


@pytest.mark.drill
@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="inductor builds C++")
def test_cuda_graphs_do_nothing_on_a_cpu(plain: dict[Any, Any]) -> None:
    torch.compiler.reset()
    assert train(config_of("dnt", train=GRAPHS), 5) == [pytest.approx(step, rel=1e-4) for step in plain["dnt"]]


@pytest.mark.parametrize(("graphs", "mode"), [(True, "reduce-overhead"), (False, None)])
def test_blocks_are_compiled_for_graphs(graphs: bool, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **settings: asked.append(settings))
    config = config_of(train=GRAPHS | {"cuda_graphs": graphs})
    build_engine(config, here())
    assert asked == [{"mode": mode}] * config.model.depth


@pytest.mark.parametrize(
    ("sections", "world", "says"),
    [
        (
            {"parallel": {"engine": "deepspeed", "zero_stage": 3}, "train": {"compile": True}},
            here(),
            "write --parallel.zero_stage 2",
        ),
        ({"parallel": {"engine": "deepspeed", "zero_stage": 0, "cpu_offload": True}}, here(), "write 1, 2 or 3"),
        ({"parallel": {"cpu_offload": True}}, GPU, "--parallel.cpu_offload false"),
        ({"parallel": {"shard_size": 2}}, here(), "--parallel.shard hybrid"),
        ({"precision": {"fp8": "rowwise"}}, GPU, "--precision.compute bf16"),
        ({"train": {"cuda_graphs": True}}, GPU, "--train.compile true"),
        ({"train": GRAPHS}, World(0, 2, torch.device("cuda")), "--train.cuda_graphs false"),
        ({"train": GRAPHS, "parallel": {"engine": "deepspeed"}}, GPU, "--train.cuda_graphs false"),
        ({"train": GRAPHS | {"micro_batch": 1}}, GPU, "--train.micro_batch null"),
        ({"train": {"checkpoint_every_block": 2}}, here(), "with selective, or null"),
        (
            {"train": {"activation_checkpointing": "selective", "checkpoint_every_block": 0}},
            here(),
            "checkpoint_every_block is 0",
        ),
        ({"precision": {"fp8": "mxfp8"}, "model": {"ffn_width": 48}}, here(), "multiples of 32"),
        ({"precision": {"fp8": "rowwise", "fp8_skip": ["attention.query"]}}, here(), "contains 'attention.query'"),
        ({"precision": {"fp8": "rowwise", "fp8_skip_first": 3}}, here(), "leave no linear"),
        ({"precision": {"fp8": "rowwise", "fp8_skip_last": -1}}, here(), "write 0 or more"),
    ],
)
def test_impossible_pairs_are_refused(sections: dict[str, Any], world: World, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_engine(config_of(**sections), world)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["deepspeed", "torchao"])
def test_an_optional_package_is_asked_for_by_name(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    load = importlib.import_module

    def missing(name: str) -> Any:
        if name.startswith(package):
            raise ImportError(name)
        return load(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    sections = {"parallel": {"engine": "deepspeed"}} if package == "deepspeed" else {"precision": {"fp8": "rowwise"}}
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        build_engine(config_of(**sections), here())


def test_the_shard_group_divides_the_ranks() -> None:
    world = World(0, 8, torch.device("cpu"), local_size=4)
    hybrid = config_of(parallel={"shard": "hybrid"}).parallel
    assert shard_size(hybrid, world) == 4
    for size, near in ((3, 2), (16, 8), (0, 1)):
        given = config_of(parallel={"shard": "hybrid", "shard_size": size}).parallel
        with pytest.raises(ConfigError, match=f"write {near}"):
            shard_size(given, world)


def test_nodes_that_differ_need_a_shard_size() -> None:
    world = World(0, 6, torch.device("cpu"), local_size=0)
    with pytest.raises(ConfigError, match="different numbers of ranks: write one"):
        shard_size(config_of(parallel={"shard": "hybrid"}).parallel, world)
    assert shard_size(config_of(parallel={"shard": "hybrid", "shard_size": 3}).parallel, world) == 3


def test_settings_that_do_nothing_are_said() -> None:
    said = build_engine(config_of(parallel={"zero_stage": 3}, precision={"fp8_skip_first": 1}), here()).describe()
    assert "parallel.zero_stage 3 is of engine deepspeed and does nothing here" in said
    assert "precision.fp8_skip, fp8_skip_first and fp8_skip_last do nothing where precision.fp8 is none" in said
    assert unheeded(config_of(parallel={"engine": "deepspeed", "zero_stage": 3}), GPU) == []
    assert unheeded(config_of(parallel={"engine": "deepspeed", "shard": "hybrid"}), GPU) == [
        "parallel.shard hybrid is of engine fsdp and does nothing here"
    ]
    replayed = config_of(train={"compile": True, "cuda_graphs": True})
    assert unheeded(replayed, here()) == ["train.cuda_graphs does nothing on a CPU"]
    assert unheeded(replayed, GPU) == []


def ruin(stage: int) -> list[float]:
    """Norms of three steps, of which the second has a gradient that is not finite."""
    config = config_of(parallel={"engine": "deepspeed", "zero_stage": stage})
    engine = build_engine(config, here())
    engine.initialize()
    norms = [advance(engine, config, range(1))[0][1]]
    handle = next(engine.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    norms.append(advance(engine, config, range(1, 2))[0][1])
    handle.remove()
    return [*norms, advance(engine, config, range(2, 3))[0][1]]


def test_an_update_that_deepspeed_leaves_out_is_not_forgotten() -> None:
    """The norm stays infinite until metrics are read, so that the run ends as it does under fsdp."""
    for first, *later in run_ranks(ruin, 2, 2, timeout=100):
        assert first < 1e3
        assert not any(norm < 1e30 for norm in later)
