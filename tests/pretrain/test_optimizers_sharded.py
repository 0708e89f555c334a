"""Optimizers on two gloo ranks: sharded parameters end where whole ones do.

Ranks answer in lists: a tensor would travel as a file descriptor that dies with its rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from pretrain.config import OptimizerConfig
from pretrain.optimizers import MSGDW, build_optimizer
from pretrain.telemetry import record_sites, scalars
from tests.ranks import run_ranks

SHAPES = [(3, 2), (1,), (4,), (5,)]  # over two ranks: uneven, one shard empty, even; the last stays whole
STEPS = 4


def values(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def step_all(held: list[nn.Parameter], optimizer: MSGDW, place: Any) -> None:
    for step in range(STEPS):
        for parameter, gradient in zip(held, values(1 + step), strict=True):
            parameter.grad = place(parameter, gradient)
        optimizer.step()


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def settings(nesterov: bool, dtype: torch.dtype) -> dict[str, Any]:
    return {"lr": 0.1, "weight_decay": 0.1, "nesterov": nesterov, "momentum_dtype": dtype}


def hand_sharded(nesterov: bool, dtype: torch.dtype) -> list[list[Any]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    *sharded, plain = values(0)
    held = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in sharded]
    held.append(nn.Parameter(plain))

    def place(parameter: Tensor, gradient: Tensor) -> Tensor:
        return distribute_tensor(gradient, mesh, [Shard(0)]) if isinstance(parameter, DTensor) else gradient

    optimizer = MSGDW(held, **settings(nesterov, dtype))
    step_all(held, optimizer, place)
    for parameter in held[:-1]:
        assert isinstance(parameter, DTensor)
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert isinstance(momentum, DTensor)
        assert (momentum.placements, momentum.shape, momentum.dtype) == (
            parameter.placements,
            parameter.shape,
            dtype,
        )
    return [whole(p).tolist() for p in held]


@pytest.mark.parametrize(("nesterov", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_shards_and_plain_tensors_in_one_group(nesterov: bool, dtype: torch.dtype) -> None:
    single = [nn.Parameter(value) for value in values(0)]
    step_all(single, MSGDW(single, **settings(nesterov, dtype)), lambda _, gradient: gradient)
    for held in run_ranks(hand_sharded, 2, nesterov, dtype):
        # elementwise in the same order: the same bits
        assert held == [parameter.tolist() for parameter in single]


def partial_gradient() -> list[float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    gain = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    gain.grad = DTensor.from_local(torch.tensor([1.0, 2.0]) * (1 + dist.get_rank()), mesh, [Partial()])
    MSGDW([gain], lr=0.1).step()
    return whole(gain).tolist()


def test_a_partial_gradient_is_summed_before_it_is_used() -> None:
    for gain in run_ranks(partial_gradient, 2):
        assert gain == pytest.approx([1 - 0.1 * (1 + 2), 1 - 0.1 * (2 + 4)])


class Site(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.7]))
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 5, bias=False)
        self.norm = Site()
        self.down = nn.Linear(5, 1, bias=False)
        self.free = nn.Parameter(torch.ones(2))  # FSDP is told to leave it alone

    def forward(self, x: Tensor) -> Tensor:
        return self.free.mean() * self.down(self.norm(self.up(x)))


ROLES = {
    "free": "gain",
    "up.weight": "matrix",
    "norm.alpha": "alpha",
    "norm.weight": "gain",
    "down.weight": "matrix",
}


def fit(config: OptimizerConfig, steps: int, shard: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """Weights after ``steps`` steps, with the optimizer saved and loaded into a fresh one halfway."""
    torch.manual_seed(0)
    model = Small()
    if shard:
        for block in (model.up, model.norm, model.down):
            fully_shard(block)
        fully_shard(model, ignored_params={model.free})
    optimizer = build_optimizer(dict(model.named_parameters()), ROLES, config)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))  # every rank sees the same batch
    with record_sites(model) as sites:
        model(x)
    for step in range(steps):
        if step == steps // 2:
            options = StateDictOptions(full_state_dict=True)
            saved = get_optimizer_state_dict(model, optimizer, options=options)
            optimizer = build_optimizer(dict(model.named_parameters()), ROLES, config)
            set_optimizer_state_dict(model, optimizer, saved, options=options)
        (model(x) - x.sum(-1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(p).tolist() for name, p in model.named_parameters()}, scalars(sites)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(name="msgdw", lr=0.05, weight_decay=0.1),
        OptimizerConfig(name="msgdw", lr=0.05, momentum_dtype="bf16"),
        OptimizerConfig(name="adamw", lr=0.05, weight_decay=0.1),
    ],
    ids=["msgdw", "msgdw-bf16", "adamw"],
)
def test_fsdp_trains_as_one_process_does(config: OptimizerConfig) -> None:
    """With an empty shard (alpha), a parameter outside FSDP, and the optimizer state through a round trip."""
    weights, sites = fit(config, 6, shard=False)
    for theirs, their_sites in run_ranks(fit, 2, config, 6, True):
        # FSDP sums the ranks' equal gradients and halves them, exactly; products may differ in a last place
        for name, weight in weights.items():
            torch.testing.assert_close(torch.tensor(theirs[name]), torch.tensor(weight), rtol=1e-5, atol=1e-6)
        assert set(their_sites) == {"alpha/norm", "inverse_std/norm"}
        assert their_sites == pytest.approx(sites, rel=1e-6)
