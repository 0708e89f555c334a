"""The machines that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from models.errors import ConfigError
from pretrain.distributed import World
from pretrain.telemetry.devices import Gpu

# Shares of memory and bandwidth that are not there for the taking. Assumptions, which the plan prints.
RUNTIME = 1.5e9  # bytes: the CUDA context with its kernels, and NCCL's channels
FRAGMENTS = 0.04  # of the memory, in the allocator's gaps
NETWORK = 0.8  # of a link's bandwidth that a large collective reaches


@dataclass(frozen=True)
class Cluster:
    """``intra_node`` and ``inter_node``: bytes per second each way that a GPU's collectives reach; the latter is None
    where it is unknown, and there is one node."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    intra_node: float
    inter_node: float | None

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def reserve(self) -> float:
        """Bytes of a GPU's memory that tensors cannot have."""
        return RUNTIME + FRAGMENTS * self.gpu.memory

    def world(self) -> World:
        """Its first rank."""
        return World(0, self.ranks, torch.device("cuda"), local_size=self.gpus_per_node)

    def peak(self, compute: Literal["fp32", "bf16"]) -> float:
        """FLOP/s of one GPU; fp32 without tf32, which training does not allow."""
        return self.gpu.peak.bf16 if compute == "bf16" else self.gpu.peak.fp32


def cluster_of(
    gpu: Gpu,
    nodes: int,
    gpus_per_node: int,
    intra_node: float | None = None,
    inter_node: float | None = None,
) -> Cluster:
    """Bandwidths that are not given, in bytes per second, are ``NETWORK`` of the data sheet's. ConfigError where there
    are several nodes and no data sheet that says how they are connected."""
    for name, value in (("nodes", nodes), ("gpus-per-node", gpus_per_node)):
        if value < 1:
            raise ConfigError(f"--{name} is {value}: write a positive number")
    for name, bandwidth in (("intra-node-gb-s", intra_node), ("inter-node-gb-s", inter_node)):
        if bandwidth is not None and not bandwidth > 0:
            raise ConfigError(f"--{name} is {bandwidth / 1e9:g}: write a positive number of 10^9 bytes per second")
    if inter_node is None and gpu.inter_node is not None:
        inter_node = NETWORK * gpu.inter_node
    if inter_node is None and nodes > 1:
        raise ConfigError(
            "--inter-node-gb-s is missing, and no server of this GPU's maker says it: write the 10^9 bytes per second, "
            "each way, that one GPU has to other nodes"
        )
    return Cluster(nodes, gpus_per_node, gpu, intra_node or NETWORK * gpu.intra_node, inter_node)
