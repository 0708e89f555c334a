"""A plan against arithmetic by hand, against tensors that a real model saves, and against properties it must have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import PLANS, ConfigError, ModelConfig, Transformer, kernels
from models.initialization import initialize
from pretrain.cli import load
from pretrain.config import DataConfig, OptimizerConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from pretrain.counts import derive_counts
from pretrain.planning import Cluster, cluster_of, find_remedy, largest_micro_batch, make_plan
from pretrain.planning.cluster import FRAGMENTS, RUNTIME
from pretrain.planning.layout import Moment
from pretrain.planning.plan import layout_of
from pretrain.planning.sizes import measure
from pretrain.planning.terms import Terms
from pretrain.planning.trace import trace
from pretrain.telemetry.devices import GPUS

LLAMA_7B = Path(__file__).parents[2] / "configs" / "models" / "llama-7b.yaml"
PARAMETERS = 6_738_415_616
GAINS = (2 * 32 + 1) * 4096
MATRICES = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # of the blocks
VOCABULARY = 32_000 * 4096  # elements of the embedding, and of the head
H100 = GPUS["h100-80gb"]


def llama_7b(*overrides: str) -> RunConfig:
    return load(LLAMA_7B, ["--train.compile", "false", *overrides])


def small(**sections: dict[str, Any]) -> RunConfig:
    """Four blocks; ``sections`` change settings, e.g. train={"micro_batch": 2}."""
    config = RunConfig(
        model=ModelConfig(plan="llama", width=64, depth=4, heads=4, ffn_width=128, vocab_size=256, context=64),
        data=DataConfig(sequence_length=64),
        train=TrainConfig(steps=10, batch_tokens=64 * 64, micro_batch=1),
        optimizer=OptimizerConfig(name="adamw", lr=1e-3),
        parallel=ParallelConfig(),
        precision=PrecisionConfig(),
    )
    return replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()})


def held(config: RunConfig, cluster: Cluster, moment: Moment) -> Terms:
    world = cluster.world()
    return layout_of(config, world, derive_counts(config, world.size)).held(moment)


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"),
    [
        (("adamw", "fp32"), 4 + 4 + 8),
        (("adamw", "bf16"), 4 + 4 + 4),
        (("msgdw", "fp32"), 4 + 4 + 4),
        (("msgdw", "bf16"), 4 + 4 + 2),
    ],
)
def test_llama_7b_on_one_gpu_by_hand(optimizer: tuple[str, str], bytes_each: int) -> None:
    name, dtype = optimizer
    config = llama_7b("--optimizer.name", name, "--optimizer.state_dtype", dtype)
    plan = make_plan(config, cluster_of(H100, 1, 1), 0.4)
    assert plan.sizes.parameters == PARAMETERS == MATRICES + GAINS + 2 * VOCABULARY
    assert plan.pace.flops_per_token == 6 * (MATRICES + VOCABULARY) + 12 * 32 * 4096 * 4096
    step = held(config, plan.cluster, Moment("step"))
    assert step.parameters + step.gradients + step.optimizer == bytes_each * PARAMETERS
    assert not plan.fits
    assert plan.transfers == []


def test_llama_7b_shared_by_hand() -> None:
    """FSDP on 64 ranks, which divide every size: a rank has a 64th of all matrices, and all gains."""
    config, cluster = llama_7b(), cluster_of(H100, 8, 8)
    own = (MATRICES + 2 * VOCABULARY) // 64 + GAINS
    step = held(config, cluster, Moment("step"))
    assert (step.parameters, step.gradients, step.optimizer, step.gathered) == (4 * own, 4 * own, 8 * own, 0)
    block = MATRICES // 32
    first = held(config, cluster, Moment("backward", 0))  # one block in bf16, embedding and head in fp32
    assert first.gathered == 2 * block + 4 * 2 * VOCABULARY
    assert first.communication == 4 * block  # the gradients of block 1 on their way


def test_traffic_by_hand() -> None:
    """64 ranks, 16 micro-batches: everything is gathered for the forward, blocks again for the backward, gradients
    reduced in each; seven eighths of it stay inside a node, and of the eighth that a rank sends out, seven eighths
    go to other nodes."""
    plan = make_plan(llama_7b(), cluster_of(H100, 8, 8), 0.4)
    sent = {(one.collective.kind, one.collective.when): one for one in plan.transfers}
    root = 4 * 2 * VOCABULARY
    expected = {
        ("all-gather", "forward"): 16 * (2 * MATRICES + root),
        ("all-gather", "backward"): 16 * 2 * MATRICES,
        ("reduce-scatter", "backward"): 16 * (4 * MATRICES + root),
        ("all-reduce", "after"): 2 * 4 * GAINS,
    }
    assert {key: one.intra for key, one in sent.items()} == {k: v * 7 / 8 for k, v in expected.items()}
    assert {key: one.inter for key, one in sent.items()} == {k: v / 8 * 7 / 8 for k, v in expected.items()}
    gather = sent["all-gather", "forward"]
    assert gather.seconds == max(gather.intra / (0.8 * 450e9), gather.inter / (0.8 * 50e9))


def test_pace_by_hand() -> None:
    """Where the network is hidden, tokens per second are peak times MFU over FLOPs; where it is not, seconds add up."""
    fast = make_plan(llama_7b(), cluster_of(H100, 8, 8), 0.4)
    assert fast.pace.tokens_per_second == pytest.approx(64 * 989.4e12 * 0.4 / fast.pace.flops_per_token, rel=1e-5)
    assert fast.pace.days == pytest.approx(135_002_062_848 / fast.pace.tokens_per_second / 86_400)
    assert fast.pace.gpu_hours == pytest.approx(fast.pace.days * 24 * 64)
    slow = make_plan(llama_7b(), cluster_of(H100, 8, 8, inter_node=1e9), 0.4)
    assert slow.pace.exposed == pytest.approx(slow.pace.communication - slow.pace.compute, rel=1e-5)
    again = make_plan(llama_7b("--train.activation_checkpointing", "full"), cluster_of(H100, 8, 8), 0.4)
    assert again.pace.compute == pytest.approx(fast.pace.compute * 4 / 3)
    assert again.pace.mfu == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("plan", ["llama", "dnt", "dyt", "gpt", "deepnorm", "fixup", "nf", "sigma-reparam"])
def test_what_a_block_saves_is_what_real_tensors_show(plan: str, compute: str) -> None:
    """Of real tensors that autograd keeps, in models of two and of three blocks: the difference is one block's."""
    changed = replace(small().model, plan=plan, trunk="gpt" if plan == "gpt" else "llama", dropout=0.1)
    config = replace(small(precision={"compute": compute}), model=changed)
    saved = [_saved_by_a_real_forward(config, depth) for depth in (2, 3)]
    cost = trace(config, 2, gathered_bf16=False, keeps_gradients=True, on_gpu=False).blocks[-1].saved
    assert cost.total == saved[1] - saved[0]


@pytest.mark.parametrize("plan", ["llama", "dnt", "dyt"])
def test_fused_kernels_save_less(plan: str) -> None:
    """On a GPU, unless it is told not to use them; what they save is what their operators keep of real tensors."""
    config = replace(small(precision={"compute": "bf16"}), model=replace(small().model, plan=plan))
    plain = replace(config, train=replace(config.train, kernels="torch"))
    fused, unfused = (
        trace(of, 2, gathered_bf16=False, keeps_gradients=True, on_gpu=True).blocks[-1].saved.total
        for of in (config, plain)
    )
    two, three = (_saved_by_a_real_forward(config, depth, fused=True) for depth in (2, 3))
    assert fused == three - two
    assert fused < 0.9 * unfused


@pytest.mark.parametrize(
    ("plan", "compile"),
    [
        ("mix-ln", True),
        ("hybridnorm-star", False),
        pytest.param("mix-ln", False, marks=pytest.mark.survey),
        pytest.param("hybridnorm-star", True, marks=pytest.mark.survey),
    ],
)
def test_blocks_of_two_kinds(plan: str, compile: bool) -> None:
    """Each block has the cost of its kind, as a model has it in which all are of that kind; so with recomputation."""
    config = small(train={"compile": compile, "activation_checkpointing": "none" if compile else "selective"})
    config = replace(config, model=replace(config.model, plan=plan, depth=7, first_blocks=3))
    whole = [
        trace(
            replace(config, model=replace(config.model, first_blocks=count)),
            2,
            gathered_bf16=False,
            keeps_gradients=True,
            on_gpu=False,
        ).blocks
        for count in (3, 7, 0)
    ]
    found, all_first, none_first = ([block.saved.total for block in blocks] for blocks in whole)
    assert found[1:3] == all_first[1:3]
    assert found[3:] == none_first[3:]
    assert len(found) == 7


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("plan", PLANS)
def test_sizes_are_the_models(plan: str, ranks: int) -> None:
    config = replace(small().model, plan=plan)
    sizes = measure(config, ranks)
    assert sizes.parameters == sum(parameter.numel() for parameter in Transformer(config).parameters())
    vectors = [p.numel() for p in Transformer(config).parameters() if p.ndim == 1]
    assert sizes.replicated == sum(vectors)


def _saved_by_a_real_forward(config: RunConfig, depth: int, fused: bool = False) -> int:
    model = Transformer(replace(config.model, depth=depth))
    if fused:
        kernels.fuse(model)
    initialize(model, config.model, 0)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros(2, config.data.sequence_length, dtype=torch.int64)
    bf16 = config.precision.compute == "bf16"
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=bf16):
        model(tokens, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _plans() -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    for shard in ("full", "grad_op", "hybrid", "replicate"):
        yield shard, {"parallel": {"shard": shard}}
    yield "bf16", {"precision": {"compute": "bf16"}, "optimizer": {"state_dtype": "bf16"}}
    yield "recomputed", {"train": {"activation_checkpointing": "full"}}
    for stage in range(4):
        yield f"zero {stage}", {"parallel": {"engine": "deepspeed", "zero_stage": stage}}


@pytest.mark.parametrize("sections", [pytest.param(s, id=name) for name, s in _plans()])
def test_more_ranks_never_need_more_and_larger_micro_batches_never_less(sections: dict[str, dict[str, Any]]) -> None:
    def total(ranks: int, micro_batch: int) -> float:
        changed = sections | {"train": sections.get("train", {}) | {"micro_batch": micro_batch}}
        return make_plan(small(**changed), cluster_of(H100, ranks // 2, 2), 0.4).peak.terms.total

    by_ranks = [total(ranks, 1) for ranks in (2, 4, 8, 16, 32)]
    assert by_ranks == sorted(by_ranks, reverse=True)
    by_size = [total(4, size) for size in (1, 2, 4, 8, 16)]
    assert by_size == sorted(by_size)


def test_less_recomputed_is_more_kept() -> None:
    every = [{"activation_checkpointing": "selective", "checkpoint_every_block": n} for n in (1, 2, 4)]
    settings = [{"activation_checkpointing": "full"}, *every, {"activation_checkpointing": "none"}]
    cluster = cluster_of(H100, 1, 2)
    totals = [make_plan(small(train=train | {"micro_batch": 8}), cluster, 0.4).peak.terms.total for train in settings]
    assert totals[0] == totals[1]
    assert totals == sorted(totals)
    assert totals[-1] > totals[-2]


def test_hybrid_sends_less_between_nodes_than_full() -> None:
    def between(shard: str) -> float:
        plan = make_plan(llama_7b("--parallel.shard", shard), cluster_of(H100, 8, 8), 0.4)
        return sum(one.inter for one in plan.transfers)

    assert between("hybrid") < between("full") / 10  # once a step instead of three times in 16 micro-batches


def test_fp8_gathers_half_of_bf16s_bytes() -> None:
    """Of the blocks, under tensorwise scales; embedding and head stay fp32."""

    def gathered(recipe: str) -> float:
        plan = make_plan(llama_7b("--precision.fp8", recipe), cluster_of(H100, 1, 8), 0.4)
        return sum(
            o.intra for o in plan.transfers if (o.collective.kind, o.collective.when) == ("all-gather", "backward")
        )

    assert gathered("tensorwise") == gathered("none") / 2
    assert gathered("rowwise") == gathered("none")


def test_zero_stages_share_one_thing_after_the_other() -> None:
    """fp32 AdamW on 8 ranks, in bytes a parameter (arXiv 1910.02054, figure 1, with its fp32 copy from stage 1 on)."""
    cluster = cluster_of(H100, 1, 8)
    found = {}
    for stage in range(4):
        config = small(parallel={"engine": "deepspeed", "zero_stage": stage}, train={"micro_batch": 2})
        step = held(config, cluster, Moment("step"))
        elements = layout_of(config, cluster.world(), derive_counts(config, 8)).sizes.parameters
        found[stage] = tuple(x / elements for x in (step.parameters, step.gradients, step.optimizer))
    assert found == {0: (4, 4, 8), 1: (4, 4, 12 / 8), 2: (4, 4 / 8, 12 / 8), 3: (4 / 8, 4 / 8, 12 / 8)}


def test_offloading_moves_bytes_to_the_cpu() -> None:
    cluster = cluster_of(H100, 1, 8)
    here, there = (make_plan(llama_7b("--parallel.cpu_offload", x), cluster, 0.4) for x in ("false", "true"))
    assert here.host == 0
    assert there.host == 16 * (PARAMETERS - GAINS) / 8
    assert there.peak.terms.optimizer == 8 * GAINS


def with_memory(memory: float) -> Cluster:
    """One GPU with so many bytes for tensors."""
    return cluster_of(H100._replace(memory=(memory + RUNTIME) / (1 - FRAGMENTS), inter_node=None), 1, 1)


def need(config: RunConfig) -> float:
    return make_plan(config, cluster_of(H100, 1, 1), 0.4).peak.terms.total


@pytest.mark.parametrize("micro_batch", [1, 4, 16, 64])
def test_the_largest_micro_batch_is_the_largest(micro_batch: int) -> None:
    """Given exactly what it needs it fits, and the next one that divides 64 sequences does not."""
    cluster = with_memory(need(small(train={"micro_batch": micro_batch})) + 1)
    plan = make_plan(small(), cluster, 0.4)
    assert largest_micro_batch(plan, 0.4) == micro_batch
    assert make_plan(small(train={"micro_batch": micro_batch}), cluster, 0.4).fits
    if micro_batch < 64:
        assert not make_plan(small(train={"micro_batch": 2 * micro_batch}), cluster, 0.4).fits


def test_cuda_graphs_take_all_sequences_at_once() -> None:
    replayed = small(train={"compile": True, "cuda_graphs": True, "micro_batch": None})
    enough = with_memory(need(replayed) + 1)
    assert largest_micro_batch(make_plan(replayed, enough, 0.4), 0.4) == 64
    less = with_memory(need(replayed) - 1)
    assert largest_micro_batch(make_plan(replayed, less, 0.4), 0.4) is None


@pytest.mark.parametrize(
    ("given", "enough", "changes"),
    [
        ({"micro_batch": 8}, {"train": {"micro_batch": 4}}, ["--train.micro_batch 4"]),
        ({"micro_batch": 8}, {"train": {"micro_batch": 1}}, ["--train.micro_batch 1"]),
        (
            {"micro_batch": 1},
            {"train": {"activation_checkpointing": "selective"}},
            ["--train.activation_checkpointing selective"],
        ),
        (
            {"micro_batch": 1},
            {"train": {"activation_checkpointing": "full"}},
            ["--train.activation_checkpointing full"],
        ),
    ],
)
def test_the_first_change_that_suffices_is_named(
    given: dict[str, Any], enough: dict[str, dict[str, Any]], changes: list[str]
) -> None:
    """On a GPU with just the memory that the changed configuration needs."""
    plan = make_plan(small(train=given), with_memory(need(small(**enough)) + 1), 0.4)
    assert not plan.fits
    remedy = find_remedy(plan, 0.4)
    assert remedy is not None
    assert [change.write for change in remedy.changes] == changes
    assert remedy.plan.fits


def test_bf16_moments_come_after_recomputation() -> None:
    """mSGDW on one GPU of 96 GB with all recomputed: 12 bytes a parameter do not fit, 10 do."""
    config = llama_7b("--optimizer.name", "msgdw", "--train.activation_checkpointing", "full")
    plan = make_plan(config, cluster_of(GPUS["gh200-96gb"], 1, 1), 0.4)
    remedy = find_remedy(plan, 0.4)
    assert remedy is not None
    assert [change.write for change in remedy.changes] == ["--optimizer.state_dtype bf16"]


def test_changes_add_up_where_none_suffices_alone() -> None:
    """One node whose network is unknown, so that more GPUs are no way out. Moments in bf16 are left out: what rounding
    them takes is more than they save in a model so small."""
    least = small(train={"activation_checkpointing": "full"}, parallel={"shard": "full"})
    given = small(train={"micro_batch": 8}, parallel={"shard": "replicate"})
    gpu = H100._replace(inter_node=None)
    needed = make_plan(least, cluster_of(gpu, 1, 8), 0.4).peak.terms.total
    cluster = cluster_of(gpu._replace(memory=(needed + 1 + RUNTIME) / (1 - FRAGMENTS)), 1, 8)
    remedy = find_remedy(make_plan(given, cluster, 0.4), 0.4)
    assert remedy is not None
    assert [change.write for change in remedy.changes] == [
        "--train.micro_batch 1",
        "--train.activation_checkpointing selective",
        "--train.activation_checkpointing full",
        "--parallel.shard full",
    ]
    assert remedy.plan.fits


def test_nothing_helps_where_nothing_can() -> None:
    plan = make_plan(small(), with_memory(1000), 0.4)
    assert not plan.fits
    assert largest_micro_batch(plan, 0.4) is None
    assert find_remedy(plan, 0.4) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"vocab_size": None}}, "write --model.vocab_size"),
        ({"parallel": {"shard_size": 4}}, "write --parallel.shard hybrid"),
        ({"parallel": {"shard": "hybrid", "shard_size": 3}}, "does not divide the 16 ranks: write 2"),
        ({"train": {"batch_tokens": 100}}, "write 1024"),
        ({"train": {"checkpoint_every_block": 2}}, "write a positive number with selective"),
        ({"optimizer": {"lr_factors": {"aplha": 0.1}}}, "role of no parameter"),
    ],
)
def test_mistakes_are_told(change: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        make_plan(small(**change), cluster_of(H100, 2, 8), 0.4)
    assert "\n" not in str(told.value)


def test_an_unknown_network_is_asked_for() -> None:
    l4 = GPUS["l4"]
    assert cluster_of(l4, 1, 8).inter_node is None
    assert cluster_of(l4, 2, 8, inter_node=12e9).inter_node == 12e9
    with pytest.raises(ConfigError, match="--inter-node-gb-s is missing"):
        cluster_of(l4, 2, 8)


def test_planning_leaves_no_fake_tensor_behind() -> None:
    make_plan(small(), cluster_of(H100, 1, 1), 0.4)
    model = Transformer(small().model)
    assert type(model(torch.zeros(1, 4, dtype=torch.int64)).detach()) is Tensor
