"""How fast a run would be: arithmetic at an assumed utilization, and what the network adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.counts import Counts
from pretrain.planning.cluster import Cluster
from pretrain.planning.sizes import Sizes
from pretrain.planning.traffic import Transfer
from pretrain.telemetry.flops import flops_per_token


@dataclass(frozen=True)
class Pace:
    """Of one optimizer step; seconds."""

    flops_per_token: int
    recomputed: float  # share of the forward's arithmetic that the backward repeats
    compute: float
    communication: float
    exposed: float  # communication that no arithmetic hides
    tokens_per_second: float  # of all GPUs
    mfu: float  # what is left of the assumed one
    days: float
    gpu_hours: float


def find_pace(
    config: RunConfig, cluster: Cluster, counts: Counts, sizes: Sizes, transfers: Sequence[Transfer], mfu: float
) -> Pace:
    """``mfu`` is what the arithmetic reaches without recomputation and with the network hidden.

    The backward is twice the forward. Collectives of a micro-batch's forward or backward run beside it, one after the
    other, and what is longer counts; those after the last backward are never hidden. Not counted: the optimizer's own
    step, evaluation, checkpoints.
    """
    flops = flops_per_token(sizes.matmul, config.model.depth, config.model.width, counts.sequence_length)
    again = recomputed_share(config)
    forward = counts.batch_tokens * flops / (cluster.peak(config.precision.compute) * mfu * cluster.ranks) / 3
    backward = (2 + again) * forward
    took = dict.fromkeys(("forward", "backward", "last backward", "after"), 0.0)
    for transfer in transfers:
        took[transfer.collective.when] += transfer.seconds
    micro_batches = counts.accumulation
    # Each micro-batch's collectives hide behind its own part; the last one's backward has the step's beside its own.
    exposed = max(0.0, took["forward"] - forward) + took["after"]
    one, beside = backward / micro_batches, took["backward"] / micro_batches
    exposed += (micro_batches - 1) * max(0.0, beside - one) + max(0.0, beside + took["last backward"] - one)
    seconds = forward + backward + exposed
    total = counts.steps * seconds
    return Pace(
        flops_per_token=flops,
        recomputed=again,
        compute=forward + backward,
        communication=sum(took.values()),
        exposed=exposed,
        tokens_per_second=counts.batch_tokens / seconds,
        mfu=mfu * 3 * forward / seconds,
        days=total / 86_400,
        gpu_hours=total / 3_600 * cluster.ranks,
    )


def recomputed_share(config: RunConfig) -> float:
    """Of the forward's matrix products. Selective recomputation of operations repeats none of them."""
    train = config.train
    if train.activation_checkpointing == "none":
        return 0.0
    if train.activation_checkpointing == "full":
        return 1.0
    every, depth = train.checkpoint_every_block, config.model.depth
    return 0.0 if every is None else len(range(0, depth, every)) / depth
