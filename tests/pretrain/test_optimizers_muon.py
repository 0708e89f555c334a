"""Muon: torch's own bit for bit, on one rank and on several that share the matrices; other roles by another rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from models.errors import ConfigError
from pretrain.config import MuonConfig, OptimizerConfig
from pretrain.optimizers import Muon, build_optimizer
from pretrain.optimizers.muon import orthogonalized
from tests.ranks import run_ranks

SHAPES = [(8, 12), (7, 3), (6, 6), (3, 5), (12, 4)]  # wide, tall and uneven, square, more ranks than rows each, tall
STEPS = 3


def values(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def group_of(held: list[nn.Parameter], adjust_lr: Any = "match_rms_adamw") -> dict[str, Any]:
    return {"params": held, "weight_decay": 0.1, **Muon.settings(0.95, adjust_lr)}


def step_all(optimizer: torch.optim.Optimizer, held: list[nn.Parameter], place: Any) -> None:
    for step in range(STEPS):
        for parameter, gradient in zip(held, values(1 + step), strict=True):
            parameter.grad = place(gradient)
        optimizer.step()


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_it_is_torchs(adjust_lr: Any) -> None:
    ours, theirs = ([nn.Parameter(value) for value in values(0)] for _ in range(2))
    optimizer = Muon([group_of(ours, adjust_lr)], 0.1)
    reference = torch.optim.Muon(theirs, 0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn=adjust_lr)
    step_all(optimizer, ours, Tensor.clone)
    step_all(reference, theirs, Tensor.clone)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"])


def test_an_update_is_nearly_orthogonal_and_has_the_size_that_is_printed() -> None:
    """Singular values between 0.5 and 1.5 (the iteration's own promise) times the learning rate's factor."""
    for shape in ((40, 60), (60, 40)):
        held = nn.Parameter(torch.zeros(shape))
        held.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([{"params": [held], **Muon.settings(0.95, "match_rms_adamw")}], 0.1).step()
        singular = torch.linalg.svdvals(held.detach()) / (0.1 * 0.2 * 60**0.5)
        assert 0.5 < singular.min() <= singular.max() < 1.5
        assert held.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)


@pytest.mark.parametrize(("dtype", "rounding"), [("fp32", "nearest"), ("bf16", "nearest"), ("bf16", "stochastic")])
def test_the_momentum_in_bf16_is_rounded_after_the_matrix_moved(dtype: Any, rounding: Any) -> None:
    """Two steps by hand; the first update does not see the rounding, the second one does."""
    held = nn.Parameter(values(0)[0])
    storage = torch.bfloat16 if dtype == "bf16" else torch.float32
    optimizer = Muon([group_of([held])], 0.1, state_dtype=storage, state_rounding=rounding)
    p, m = held.detach().clone(), torch.zeros_like(held)
    for step in range(2):
        gradient = values(1 + step)[0]
        m = m.lerp(gradient, 1 - 0.95)
        (update,) = orthogonalized([gradient.lerp(m, 0.95).bfloat16()], [held.shape], None)
        p = p.mul_(1 - 0.1 * 0.1).add_(update, alpha=-0.1 * 0.2 * 12**0.5)
        held.grad = gradient
        optimizer.step()
        stored = optimizer.state[held]["momentum_buffer"]
        assert torch.equal(held, p)
        assert stored.dtype == storage
        if rounding == "nearest":
            assert torch.equal(stored, m.to(storage))
        else:
            torch.testing.assert_close(stored.float(), m, rtol=2**-7, atol=0)  # one of the two neighbours
        m = stored.float()


def sharded(adjust_lr: Any, state_dtype: torch.dtype, replicas: int) -> list[list[Any]]:
    """Matrices by rows over the ranks of a replica; the whole ones at the end, and each rank's part of the momentum."""
    size = dist.get_world_size()
    mesh: DeviceMesh
    if replicas == 1:
        mesh, placements = init_device_mesh("cpu", (size,)), [Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
        placements = [Replicate(), Shard(0)]

    def place(value: Tensor) -> DTensor:
        return distribute_tensor(value, mesh, placements)

    held = [nn.Parameter(place(value)) for value in values(0)]
    optimizer = Muon([group_of(held, adjust_lr)], 0.1, state_dtype=state_dtype, state_rounding="nearest")
    step_all(optimizer, held, place)
    for parameter in held:
        moment = optimizer.state[parameter]["momentum_buffer"]
        assert (moment.placements, moment.shape, moment.dtype) == (parameter.placements, parameter.shape, state_dtype)
    return [parameter.full_tensor().tolist() for parameter in held]


CASES = [("original", torch.float32), ("match_rms_adamw", torch.bfloat16)]


def all_sharded() -> dict[Any, list[list[Any]]]:
    return {(case, replicas): sharded(*case, replicas) for case in CASES for replicas in (1, 2)}


def test_ranks_that_share_the_matrices_move_them_as_one_does() -> None:
    """Bit for bit: the momentum is elementwise, and one rank iterates on the whole matrix. Five matrices on four ranks,
    and on two replicas of two: the last batch has fewer matrices than ranks, and of three rows a shard is empty."""
    for found in run_ranks(all_sharded, 4):
        for (case, replicas), held in found.items():
            single = [nn.Parameter(value) for value in values(0)]
            adjust_lr, dtype = case
            optimizer = Muon([group_of(single, adjust_lr)], 0.1, state_dtype=dtype, state_rounding="nearest")
            step_all(optimizer, single, Tensor.clone)
            assert held == [parameter.tolist() for parameter in single], (case, replicas)


ROLES = {"embed": "embedding", "up": "matrix", "down": "matrix", "gain": "gain", "alpha": "alpha"}
CONFIG = OptimizerConfig(name="muon", lr=0.02, weight_decay=0.1, lr_factors={"alpha": 0.5})


def model_parameters() -> dict[str, nn.Parameter]:
    shapes = {"embed": (7, 4), "up": (6, 4), "down": (4, 6), "gain": (4,), "alpha": (1,)}
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def run(optimizer: torch.optim.Optimizer, held: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in held.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("others", ["adamw", "msgdw"])
def test_other_roles_move_by_the_other_rule_bit_for_bit(others: Any) -> None:
    held, alone = model_parameters(), model_parameters()
    config = replace(CONFIG, muon=MuonConfig(others=others, others_lr=0.003), nesterov=others == "msgdw")
    optimizer = build_optimizer(held, ROLES, config)
    reference = build_optimizer(alone, ROLES, replace(config, name=others, lr=0.003))
    run(optimizer, held, range(4))
    run(reference, alone, range(4))
    for name, role in ROLES.items():
        assert torch.equal(held[name], alone[name]) == (role != "matrix"), name
        if role != "matrix":
            mine, theirs = optimizer.state[held[name]], reference.state[alone[name]]
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    lrs = {group["role"]: group["lr"] for group in optimizer.param_groups}
    assert lrs == pytest.approx({"embedding": 0.003, "matrix": 0.02, "gain": 0.003, "alpha": 0.0015})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("others", ["adamw", "msgdw"])
def test_resume_is_bitwise(others: Any, dtype: Any) -> None:
    config = replace(CONFIG, muon=MuonConfig(others=others), state_dtype=dtype)
    whole = model_parameters()
    run(build_optimizer(whole, ROLES, config), whole, range(5))
    held = model_parameters()
    first = build_optimizer(held, ROLES, config)
    run(first, held, range(2))
    resumed = build_optimizer(held, ROLES, config)
    resumed.load_state_dict(first.state_dict())
    run(resumed, held, range(2, 5))
    assert all(torch.equal(held[name], whole[name]) for name in held)


def test_mistakes_are_one_line() -> None:
    gains = {"gain": "gain"}
    with pytest.raises(ConfigError, match="role matrix, and this model has none"):
        build_optimizer({"gain": model_parameters()["gain"]}, gains, replace(CONFIG, lr_factors={}))
    for muon, says in (
        (MuonConfig(momentum=1.0), r"optimizer\.muon\.momentum is 1\.0"),
        (MuonConfig(others_lr=-1.0), r"optimizer\.muon\.others_lr is -1\.0"),
    ):
        with pytest.raises(ConfigError, match=says):
            build_optimizer(model_parameters(), ROLES, replace(CONFIG, muon=muon))
    others = replace(CONFIG, muon=MuonConfig(others="msgdw"), nesterov=True, momentum=0.0)
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov"):
        build_optimizer(model_parameters(), ROLES, others)
    with pytest.raises(ConfigError, match=r"lr 0: write a positive"):
        build_optimizer(model_parameters(), ROLES, replace(CONFIG, lr=0.0, muon=MuonConfig(others_lr=0.1)))
