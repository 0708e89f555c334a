"""Saved under one world size, loaded under another: FSDP2 on gloo, shards empty and uneven, with optimizer state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from models.errors import ConfigError
from pretrain.checkpoint import Checkpointer
from tests.ranks import run_ranks


class Scaled(nn.Module):
    """A matrix that does not divide by 4, a bias, and an alpha of one element: three of four shards are empty."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.linear = nn.Linear(width, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(self.alpha * x))


def build(width: int = 5, seed: int | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same full tensors at every world size: seeded ones, or zeros to be loaded into."""
    model = Scaled(width)
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) if seed else torch.zeros(()))
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01 if seed else 0.5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step with gradients that do not depend on the world size."""
    for index, parameter in enumerate(model.parameters()):
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    optimizer.step()


def full(value: Any) -> Any:
    """A copy of nested values with every DTensor put together."""
    if isinstance(value, dict):
        return {key: full(inner) for key, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return value


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def checkpointer(folder: Path) -> Checkpointer:
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    return Checkpointer(folder, keep=2, keep_every=None, group=group)


def save(folder: Path) -> dict[str, Any]:
    model, optimizer = build(seed=3)
    train(model, optimizer)
    tensors = tensors_of(model, optimizer)
    rank = dist.get_rank()
    extras = {"step": 1, "of": rank, "data": {f"lane-{rank}": rank * 10, "seed": 5}}
    checkpointer(folder).save(1, tensors, extras, {"rank": rank, "cpu": torch.get_rng_state()})
    return full(tensors)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    model, optimizer = build()
    tensors = tensors_of(model, optimizer)
    loader = checkpointer(folder)
    committed = loader.latest()
    assert committed is not None
    extras, rank_state = loader.load(committed, tensors)
    loaded = full(tensors)
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    train(model, optimizer)
    return loaded, extras, rank_state, full(tensors_of(model, optimizer)["model"])


def assert_bitwise(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_bitwise(left[key], right[key])
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.equal(right)
    else:
        assert left == right


def continued() -> dict[str, Any]:
    """Two steps without a checkpoint between."""
    model, optimizer = build(seed=3)
    train(model, optimizer)
    train(model, optimizer)
    return full(tensors_of(model, optimizer)["model"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[str, Any]]]:
    """Folders of checkpoints saved under several world sizes, and the full tensors saved."""
    folders = {world_size: tmp_path_factory.mktemp(f"saved-by-{world_size}") for world_size in (1, 4)}
    return {world_size: (folder, run_ranks(save, world_size, folder)[0]) for world_size, folder in folders.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    [weights] = run_ranks(continued, 1)
    return weights


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (4, 4), (1, 2)])
def test_another_world_size_loads_the_same_bits(
    runs: dict[int, tuple[Path, dict[str, Any]]], expected: dict[str, Any], before: int, after: int
) -> None:
    folder, saved = runs[before]
    assert set(saved["optimizer"]["state"]["alpha"]) == {"step", "exp_avg", "exp_avg_sq"}
    for rank, (loaded, extras, rank_state, trained) in enumerate(run_ranks(load, after, folder)):
        assert_bitwise(loaded, saved)
        # The update is elementwise, so sharding cannot change a bit of it.
        assert_bitwise(trained, expected)
        assert extras == {
            "step": 1,
            "of": 0,
            "data": {f"lane-{lane}": lane * 10 for lane in range(before)} | {"seed": 5},
        }
        assert (rank_state is not None) == (before == after)
        assert rank_state is None or rank_state["rank"] == rank


def load_another_width(folder: Path) -> str:
    loader = checkpointer(folder)
    committed = loader.latest()
    assert committed is not None
    with pytest.raises(ConfigError) as error:
        loader.load(committed, tensors_of(*build(width=6)))
    return str(error.value)


def test_another_architecture_is_the_same_line_on_all_ranks(
    runs: dict[int, tuple[Path, dict[str, Any]]],
) -> None:
    messages = run_ranks(load_another_width, 2, runs[4][0])
    assert messages[0] == messages[1]
    assert "linear.weight is (7, 5) torch.float32 in the checkpoint and (7, 6) torch.float32 in this run" in messages[0]
