"""The engine behind its protocol: evaluation without dropout or gradients, state that another engine goes on from,
blocks that are compiled and compute the same, parameters that travel as often as was asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partialmethod
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor.debug import CommDebugMode

from models.config import ModelConfig
from pretrain.batch import Batch, make_batch
from pretrain.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.distributed import World
from pretrain.engines import build_engine
from pretrain.engines.protocol import Engine
from tests.ranks import run_ranks

DEPTH, LENGTH, VOCABULARY = 3, 12, 61
WORLD = World(0, 1, torch.device("cpu"))


def small(plan: str = "dnt", **model: Any) -> RunConfig:
    sizes = {"width": 32, "depth": DEPTH, "heads": 4, "ffn_width": 40, "vocab_size": VOCABULARY, "context": LENGTH}
    return RunConfig(
        model=ModelConfig(plan=plan, **(sizes | model)),
        data=DataConfig(sequence_length=LENGTH),
        train=TrainConfig(steps=5),
        optimizer=OptimizerConfig(lr=0.1),
    )


def built(config: RunConfig, world: World = WORLD) -> Engine:
    engine = build_engine(config, world)
    engine.initialize()
    return engine


def batch(seed: int = 0, rows: int = 4) -> Batch:
    tokens = torch.randint(VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return make_batch(tokens, eos=0, document_mask=seed % 2 == 1)


def train(engine: Engine, seeds: range) -> list[float]:
    """Loss and norm of a step on each seed's batch."""
    found = []
    for seed in seeds:
        one = batch(seed)
        nll = engine.accumulate(one, torch.tensor(float(one.targets.ge(0).sum())), last=True)
        found += [nll.item(), engine.step(0.1).item()]
    return found


def test_evaluation_leaves_no_trace() -> None:
    engine = built(small(dropout=0.5))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = engine.evaluate(batch()), engine.evaluate(batch())
    assert torch.equal(first, second), "no dropout"
    assert first.dtype == torch.float32
    assert first.shape == ()
    assert not first.requires_grad
    assert all(p.grad is None for p in engine.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    targets = torch.tensor(1.0)
    noisy = [engine.accumulate(batch(), targets, last=True) for _ in range(2)]
    assert noisy[0] != noisy[1], "training goes on with dropout"


def test_observing_yields_what_the_manager_yields() -> None:
    engine = built(small())
    shapes: list[torch.Size] = []

    @contextmanager
    def watch(model: nn.Module) -> Iterator[list[torch.Size]]:
        handle = model.blocks[1].register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
        try:
            yield shapes
        finally:
            handle.remove()

    assert engine.observe(batch(), watch) is shapes
    assert shapes == [(4, LENGTH, 32)]
    assert all(p.grad is None for p in engine.model.parameters())


@pytest.mark.parametrize("optimizer", ["msgdw", "adamw"])
def test_an_engine_goes_on_from_another_s_tensors(optimizer: Literal["msgdw", "adamw"]) -> None:
    config = replace(small("dyt"), optimizer=OptimizerConfig(name=optimizer, lr=0.1, weight_decay=0.1))
    one, other = built(config), built(replace(config, seed=1))
    train(one, range(3))
    tensors = copy.deepcopy(one.tensors())
    own = {name for name, _ in one.model.named_parameters()}
    assert set(tensors["model"]) == own, "canonical names are the model's own"
    other.restore(tensors)
    assert train(other, range(3, 6)) == train(one, range(3, 6))


def test_the_update_forgets_the_gradients() -> None:
    engine = built(small())
    train(engine, range(1))
    assert all(p.grad is None for p in engine.model.parameters())


def with_counter(config: RunConfig, world: World) -> tuple[Engine, CompileCounterWithBackend]:
    """Compiled by aot_eager for inductor: the same tracing and autograd, without C++ to build; it counts its calls."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counter, fullgraph=True))
        return built(replace(config, train=replace(config.train, compile=True)), world), counter


@pytest.mark.parametrize(("plan", "seeds"), [("dnt", range(0, 6, 2)), ("dyt", range(1, 7, 2))])
def test_compiled_blocks_train_alike(plan: str, seeds: range) -> None:
    """Without and with a document mask. All blocks have the same code, so one compilation serves them."""
    eager = built(small(plan))
    engine, counter = with_counter(small(plan), WORLD)
    # fp32 with norms decomposed, sums in another order, over three steps.
    assert train(engine, seeds) == pytest.approx(train(eager, seeds), rel=1e-4)
    assert counter.frame_count == 1
    assert set(engine.tensors()["model"]) == set(eager.tensors()["model"])


def compiled_on_ranks(compile: bool) -> tuple[list[float], int]:
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    if not compile:
        return train(built(small(), world), range(0, 6, 2)), 0
    engine, counter = with_counter(small(), world)
    return train(engine, range(0, 6, 2)), counter.frame_count


@pytest.mark.drill
def test_compiled_blocks_train_alike_on_two_ranks() -> None:
    (eager, _), _ = run_ranks(compiled_on_ranks, 2, False)
    for found, graphs in run_ranks(compiled_on_ranks, 2, True):
        assert graphs >= 1
        assert found == pytest.approx(eager, rel=1e-4)


def collectives(shard: Literal["full", "grad_op"]) -> list[tuple[int, int]]:
    """(all-gathers, reduce-scatters) of each of two micro-batches, forward and backward."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    engine = built(replace(small(), parallel=ParallelConfig(shard=shard)), world)
    counted = []
    for last in (False, True):
        with CommDebugMode() as communication:
            engine.accumulate(batch(), torch.tensor(1.0), last=last)
        counts = {str(operator): count for operator, count in communication.get_comm_counts().items()}
        gathers, scatters = (
            sum(n for name, n in counts.items() if kind in name) for kind in ("allgather", "reduce_scatter")
        )
        counted.append((gathers, scatters))
    return counted


def test_full_gathers_blocks_twice_and_grad_op_once() -> None:
    """The root, embedding and head, is gathered once. grad_op reduces gradients at the last micro-batch alone."""
    groups = DEPTH + 1
    assert run_ranks(collectives, 2, "full") == [[(2 * DEPTH + 1, groups)] * 2] * 2
    assert run_ranks(collectives, 2, "grad_op") == [[(groups, 0), (groups, groups)]] * 2
