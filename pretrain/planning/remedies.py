"""How to make a run fit: the largest micro-batch, and the cheapest of the changes that are worth trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from models.errors import ConfigError
from pretrain.config import RunConfig
from pretrain.planning.cluster import Cluster
from pretrain.planning.plan import Plan, make_plan

_PER_NODE = 8  # GPUs that a node has at most
_MOST_GPUS = 4096  # beyond that, more of them is no answer


@dataclass(frozen=True)
class Change:
    """``write``: what to add to the command; ``cost`` in words."""

    write: str
    cost: str
    config: RunConfig
    cluster: Cluster


@dataclass(frozen=True)
class Remedy:
    changes: list[Change]
    plan: Plan  # with all of them


def largest_micro_batch(plan: Plan, mfu: float) -> int | None:
    """The largest that fits of those that divide a rank's sequences; None if not even one sequence does."""
    sizes = micro_batches(plan.config, plan.cluster)
    low, high = -1, len(sizes)  # sizes[low] fits and sizes[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        tried = _try(_with_micro_batch(plan.config, plan.cluster, sizes[middle]), mfu)
        low, high = (middle, high) if tried is not None and tried.fits else (low, middle)
    return sizes[low] if low >= 0 else None


def micro_batches(config: RunConfig, cluster: Cluster) -> list[int]:
    """All that divide a rank's sequences, from 1 up; CUDA graphs take them all at once."""
    share = config.train.batch_tokens // (config.data.sequence_length * cluster.ranks)
    if config.train.cuda_graphs:
        return [share] if share else []
    return [size for size in range(1, share + 1) if share % size == 0]


def find_remedy(plan: Plan, mfu: float) -> Remedy | None:
    """The first change that makes ``plan`` fit. Where none does alone, those before it that help are kept, but for more
    GPUs."""
    for candidates in _CHANGES:
        for change in candidates(plan.config, plan.cluster):
            tried = _try(change, mfu)
            if tried is not None and tried.fits:
                return Remedy([change], tried)
    kept: list[Change] = []
    config, lowest = plan.config, plan.peak.terms.total
    for candidates in _CHANGES:
        last = None
        for change in candidates(config, plan.cluster):
            tried = _try(change, mfu)
            if tried is not None and tried.fits:
                return Remedy([*kept, change], tried)
            if tried is not None and candidates is not _more_gpus and tried.peak.terms.total < lowest:
                last, lowest = change, tried.peak.terms.total
        if last is not None:
            kept, config = [*kept, last], last.config
    return None


def _try(change: Change, mfu: float) -> Plan | None:
    try:
        return make_plan(change.config, change.cluster, mfu)
    except ConfigError:  # the batch does not divide, or settings exclude each other
        return None


def _with_micro_batch(config: RunConfig, cluster: Cluster, size: int) -> Change:
    return Change(
        f"--train.micro_batch {size}",
        "more and smaller matrix products; where every micro-batch gathers and reduces, more of that",
        replace(config, train=replace(config.train, micro_batch=size)),
        cluster,
    )


def _smaller_micro_batch(config: RunConfig, cluster: Cluster) -> Iterator[Change]:
    sizes = micro_batches(config, cluster)
    for size in reversed(sizes):
        if size < (config.train.micro_batch or sizes[-1]):
            yield _with_micro_batch(config, cluster, size)


def _selective(config: RunConfig, cluster: Cluster) -> Iterator[Change]:
    if config.train.activation_checkpointing == "none":
        train = replace(config.train, activation_checkpointing="selective")
        cost = "norms, activation functions and rotary positions are computed twice"
        yield Change("--train.activation_checkpointing selective", cost, replace(config, train=train), cluster)


def _full(config: RunConfig, cluster: Cluster) -> Iterator[Change]:
    if config.train.activation_checkpointing != "full":
        write = "--train.activation_checkpointing full"
        if config.train.checkpoint_every_block is not None:
            write += " --train.checkpoint_every_block null"
        train = replace(config.train, activation_checkpointing="full", checkpoint_every_block=None)
        cost = "the forward is computed twice, a third more arithmetic"
        yield Change(write, cost, replace(config, train=train), cluster)


def _bf16_state(config: RunConfig, cluster: Cluster) -> Iterator[Change]:
    if config.optimizer.state_dtype == "fp32":
        optimizer = replace(config.optimizer, state_dtype="bf16")
        cost = "moments are rounded to 8 significant bits each step"
        yield Change("--optimizer.state_dtype bf16", cost, replace(config, optimizer=optimizer), cluster)


def _shared_by_all(config: RunConfig, cluster: Cluster) -> Iterator[Change]:
    parallel = config.parallel
    cost = "parameters are gathered from all ranks for every forward and backward, gradients reduced in each"
    if parallel.engine == "deepspeed" and parallel.zero_stage < 3:
        stage = replace(config, parallel=replace(parallel, zero_stage=3))
        yield Change("--parallel.zero_stage 3", cost, stage, cluster)
    if parallel.engine == "fsdp" and parallel.shard != "full" and cluster.ranks > 1:
        write = "--parallel.shard full" + (" --parallel.shard_size null" if parallel.shard_size is not None else "")
        full = replace(config, parallel=replace(parallel, shard="full", shard_size=None))
        yield Change(write, cost, full, cluster)


def _more_gpus(config: RunConfig, cluster: Cluster) -> Iterator[Change]:
    """Twice as many, and so on: first in the node, then nodes."""
    while 2 * cluster.ranks <= _MOST_GPUS:
        if cluster.nodes == 1 and 2 * cluster.gpus_per_node <= _PER_NODE:
            cluster = replace(cluster, gpus_per_node=2 * cluster.gpus_per_node)
            write = f"--gpus-per-node {cluster.gpus_per_node}"
        elif cluster.inter_node is not None:
            cluster = replace(cluster, nodes=2 * cluster.nodes)
            write = f"--nodes {cluster.nodes}"
        else:
            return
        yield Change(write, f"{cluster.ranks} GPUs", config, cluster)


def _offload(config: RunConfig, cluster: Cluster) -> Iterator[Change]:
    if not config.parallel.cpu_offload:
        parallel = replace(config.parallel, cpu_offload=True)
        cost = "gradients and parameters cross PCIe and the CPU steps, which the pace below leaves out"
        yield Change("--parallel.cpu_offload true", cost, replace(config, parallel=parallel), cluster)


_CHANGES: tuple[Callable[[RunConfig, Cluster], Iterator[Change]], ...] = (
    _smaller_micro_batch,
    _selective,
    _full,
    _bf16_state,
    _shared_by_all,
    _more_gpus,
    _offload,
)
