"""What collectives send in a step, inside a node and between nodes, and how long it takes.

Of a collective over n nodes with k of its ranks on each, and a whole tensor of S bytes, every rank sends::

    all-gather, reduce-scatter   S · (k - 1) / k inside its node,  S / k · (n - 1) / n to another
    all-reduce                   twice that

the least that is possible, which rings inside nodes and between like ranks of all nodes reach (Thakur et al. 2005,
"Optimization of Collective Communication Operations in MPICH"). Between nodes the ranks of one share the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pretrain.planning.cluster import Cluster
from pretrain.planning.layout import Collective


@dataclass(frozen=True)
class Transfer:
    """One collective of a step, done ``times``: bytes that a rank sends and seconds, of all together."""

    collective: Collective
    times: int
    intra: float
    inter: float
    seconds: float


def transfers(collectives: Iterable[Collective], cluster: Cluster, accumulation: int) -> Iterator[Transfer]:
    """Those that send anything. A collective is as slow as the slower of its two parts, which overlap."""
    for one in collectives:
        per_node = max(1, min(one.ranks, cluster.gpus_per_node // one.stride))
        nodes = one.ranks / per_node
        times = accumulation if one.when in ("forward", "backward") else 1
        sent = times * one.size * (2 if one.kind == "all-reduce" else 1)
        intra = sent * (per_node - 1) / per_node
        inter = sent / per_node * (nodes - 1) / nodes
        if intra or inter:
            between = inter / cluster.inter_node if cluster.inter_node else 0.0
            assert between or not inter, "several nodes have a network"
            yield Transfer(one, times, intra, inter, max(intra / cluster.intra_node, between))
