"""How ranks are arranged: how many share one copy of the model, and how many copies there are."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from models.errors import ConfigError
from pretrain.config import ParallelConfig
from pretrain.distributed import World


def shard_size(parallel: ParallelConfig, world: World) -> int:
    """Ranks that share one copy of the model."""
    if parallel.shard == "replicate":
        return 1
    if parallel.shard != "hybrid":
        return world.size
    if parallel.shard_size is None and world.local_size == 0:
        raise ConfigError("parallel.shard_size is null, and nodes have different numbers of ranks: write one")
    local = world.size if world.local_size is None else world.local_size
    size = local if parallel.shard_size is None else parallel.shard_size
    if size < 1 or world.size % size:
        near = max(d for d in range(1, world.size + 1) if world.size % d == 0 and d <= max(1, size))
        raise ConfigError(f"parallel.shard_size {size} does not divide the {world.size} ranks: write {near}")
    return size


def device_mesh(parallel: ParallelConfig, world: World) -> DeviceMesh:
    """One dimension for full sharding; (replicas, ranks of one replica) for the others. Ranks of a node are
    neighbours, so that with the default size only gradients' all-reduce leaves the node."""
    size = shard_size(parallel, world)
    if parallel.shard in ("full", "grad_op"):
        return init_device_mesh(world.device.type, (size,))
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))
