"""A run on a cluster, worked out before it is started: whether it fits, how fast it is, what it sends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from models import Transformer, parameter_roles
from models.errors import ConfigError
from pretrain.config import RunConfig
from pretrain.counts import Counts, derive_counts
from pretrain.distributed import World
from pretrain.engines.combinations import refuse_impossible
from pretrain.engines.float8 import chosen_linears
from pretrain.engines.mesh import shard_size
from pretrain.optimizers import alpha_factor, build_optimizer
from pretrain.planning.cluster import Cluster
from pretrain.planning.fsdp import FSDP
from pretrain.planning.layout import Layout, OneProcess
from pretrain.planning.memory import Peak, find_peak
from pretrain.planning.pace import Pace, find_pace
from pretrain.planning.sizes import Sizes, measure
from pretrain.planning.trace import trace
from pretrain.planning.traffic import Transfer, transfers
from pretrain.planning.zero import Zero
from pretrain.step import learning_rate


@dataclass(frozen=True)
class Plan:
    """A configuration on a cluster with all that was worked out of it."""

    config: RunConfig
    cluster: Cluster
    counts: Counts
    sizes: Sizes
    peak: Peak
    host: float  # bytes of the CPU's memory for one rank
    transfers: list[Transfer]
    pace: Pace

    @property
    def fits(self) -> bool:
        return self.peak.terms.total + self.cluster.reserve <= self.cluster.gpu.memory


def make_plan(config: RunConfig, cluster: Cluster, mfu: float) -> Plan:
    """Opens no file. ConfigError where the configuration is wrong, or cannot be on so many GPUs."""
    world = cluster.world()
    counts = derive_counts(config, world.size)
    refuse_mistakes(config, world, counts)
    layout = layout_of(config, world, counts)
    sent = list(transfers(layout.collectives(), cluster, counts.accumulation))
    return Plan(
        config=config,
        cluster=cluster,
        counts=counts,
        sizes=layout.sizes,
        peak=memory(config, counts, layout, on_gpu=True),
        host=layout.host(),
        transfers=sent,
        pace=find_pace(config, cluster, counts, layout.sizes, sent, mfu),
    )


def refuse_mistakes(config: RunConfig, world: World, counts: Counts) -> None:
    """What training would refuse, as far as it does not take the data or the GPU itself to see it."""
    if config.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size is null, for the tokenizer to say, and a plan opens no data: write --model.vocab_size N"
        )
    refuse_impossible(config, world)
    learning_rate(config, counts.steps, 0)
    alpha_factor(0, counts.steps, config.optimizer.alpha)
    with torch.device("meta"):
        model = Transformer(replace(config.model, depth=1))
        build_optimizer(dict(model.named_parameters()), parameter_roles(model), config.optimizer)
        if config.precision.fp8 != "none":
            chosen_linears(Transformer(config.model), config.precision)


def layout_of(config: RunConfig, world: World, counts: Counts) -> Layout:
    """The rules of the engine that the configuration names, on so many ranks."""
    if config.parallel.engine == "deepspeed":
        return Zero(config, measure(config.model, 1), counts)
    if world.size == 1:
        return OneProcess(config, measure(config.model, 1), counts.accumulation)
    group = shard_size(config.parallel, world)
    return FSDP(config, measure(config.model, group), world.size, group, counts.accumulation)


def memory(config: RunConfig, counts: Counts, layout: Layout, on_gpu: bool) -> Peak:
    """The most that a rank holds in a step. ``on_gpu`` as for ``trace``."""
    cost = trace(
        config,
        counts.micro_batch,
        gathered_bf16=layout.gathers_bf16,
        keeps_gradients=layout.keeps_gradients,
        on_gpu=on_gpu,
    )
    return find_peak(layout, cost)
