"""Groups by role: each parameter in the one that its role says, with the values that the settings say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.errors import ConfigError
from pretrain.config import AlphaControlConfig, LionConfig, MuonConfig, OptimizerConfig
from pretrain.optimizers import CompactAdamW, Lion, Muon, SGDSaI, build_optimizer, describe, set_learning_rate

ROLES = {
    "embed.weight": "embedding",
    "up.weight": "matrix",
    "down.weight": "matrix",
    "norm.weight": "gain",
    "norm.alpha": "alpha",
}
SHAPES = {
    "embed.weight": (7, 4),
    "up.weight": (4, 4),
    "down.weight": (4, 4),
    "norm.weight": (4,),
    "norm.alpha": (1,),
}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
CONFIG = OptimizerConfig(name="msgdw", lr=0.2, weight_decay=0.1, lr_factors={"alpha": 0.5})


def named() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}


def by_role(optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {group["role"]: group for group in optimizer.param_groups}


NAMES = ["msgdw", "adamw", "lion", "muon", "sgd-sai"]


@pytest.mark.parametrize("name", NAMES)
def test_one_group_a_role_with_its_values(name: str) -> None:
    groups = by_role(build_optimizer(named(), ROLES, replace(CONFIG, name=name)))
    assert {role: sorted(group["param_names"]) for role, group in groups.items()} == {
        "embedding": ["embed.weight"],
        "matrix": ["down.weight", "up.weight"],
        "gain": ["norm.weight"],
        "alpha": ["norm.alpha"],
    }
    assert {role: group["weight_decay"] for role, group in groups.items()} == {
        "embedding": 0.1,
        "matrix": 0.1,
        "gain": 0.0,
        "alpha": 0.0,
    }
    assert {role: group["lr"] for role, group in groups.items()} == {
        "embedding": 0.2,
        "matrix": 0.2,
        "gain": 0.2,
        "alpha": 0.1,
    }


@pytest.mark.parametrize("name", NAMES)
def test_only_the_decaying_roles_shrink(name: str) -> None:
    parameters = named()
    optimizer = build_optimizer(parameters, ROLES, replace(CONFIG, name=name, decay_roles=["gain", "alpha"]))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    values = {key: parameter.flatten()[0].item() for key, parameter in parameters.items()}
    assert values == pytest.approx(
        {
            "embed.weight": 1.0,
            "up.weight": 1.0,
            "down.weight": 1.0,
            "norm.weight": 1 - 0.2 * 0.1,
            "norm.alpha": 1 - 0.1 * 0.1,  # the decay follows the role's own learning rate
        }
    )


def test_msgdw_takes_its_settings_and_adamw_is_fused() -> None:
    config = replace(CONFIG, momentum=0.8, nesterov=True, state_dtype="bf16", lr_factors={})
    optimizer = build_optimizer(named(), ROLES, config)
    assert (optimizer.storage.dtype, optimizer.storage.is_stochastic) == (torch.bfloat16, True)
    assert all(group["momentum"] == 0.8 and group["nesterov"] for group in optimizer.param_groups)
    dampened = build_optimizer(named(), ROLES, replace(CONFIG, dampening=0.3))
    assert all(group["dampening"] == 0.3 for group in dampened.param_groups)
    adamw = build_optimizer(named(), ROLES, replace(CONFIG, name="adamw", beta1=0.8, beta2=0.9, eps=1e-6))
    assert isinstance(adamw, torch.optim.AdamW)
    for group in adamw.param_groups:
        assert (group["fused"], group["betas"], group["eps"]) == (True, (0.8, 0.9), 1e-6)
    compact = build_optimizer(
        named(),
        ROLES,
        replace(CONFIG, name="adamw", beta1=0.8, beta2=0.9, eps=1e-6, state_dtype="bf16", state_rounding="nearest"),
    )
    assert isinstance(compact, CompactAdamW)
    assert (compact.storage.dtype, compact.storage.is_stochastic) == (torch.bfloat16, False)
    for group in compact.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)


def test_the_others_take_their_settings() -> None:
    lion = build_optimizer(named(), ROLES, replace(CONFIG, name="lion", lion=LionConfig(0.95, 0.98)))
    assert isinstance(lion, Lion)
    assert all(group["betas"] == (0.95, 0.98) for group in lion.param_groups)
    sai = build_optimizer(named(), ROLES, replace(CONFIG, name="sgd-sai", momentum=0.8, eps=1e-6, state_dtype="bf16"))
    assert isinstance(sai, SGDSaI)
    assert sai.storage.is_stochastic
    assert all((group["momentum"], group["eps"]) == (0.8, 1e-6) for group in sai.param_groups)
    config = replace(CONFIG, name="muon", momentum=0.8, muon=MuonConfig(0.9, "original", "msgdw", 0.5))
    muon = by_role(build_optimizer(named(), ROLES, config))
    assert isinstance(build_optimizer(named(), ROLES, config), Muon)
    assert {role: group["momentum"] for role, group in muon.items()} == {
        "matrix": 0.9,
        "embedding": 0.8,
        "gain": 0.8,
        "alpha": 0.8,
    }
    assert muon["matrix"]["adjust_lr"] == "original"
    set_learning_rate(optimizer := build_optimizer(named(), ROLES, config), 0.1)  # half of the peak
    assert {role: group["lr"] for role, group in by_role(optimizer).items()} == pytest.approx(
        {"matrix": 0.1, "embedding": 0.25, "gain": 0.25, "alpha": 0.125}
    )


def test_set_learning_rate_keeps_the_factors() -> None:
    optimizer = build_optimizer(named(), ROLES, CONFIG)
    set_learning_rate(optimizer, 0.04)
    assert by_role(optimizer)["matrix"]["lr"] == 0.04
    assert by_role(optimizer)["alpha"]["lr"] == 0.02


def test_describe_prints_the_effective_values() -> None:
    config = replace(CONFIG, dampening=0.5)
    head, *lines = describe(build_optimizer(named(), ROLES, config), config, SIZES)
    assert head == "mSGDW: momentum 0.9 stored in fp32, dampening 0.5, no Nesterov, lr 0.2"
    assert [" ".join(line.split()) for line in lines] == [
        "embedding 28 parameters lr 0.2 effective step 1 weight decay 0.1 effective decay 0.02 per step",
        "matrix 32 parameters lr 0.2 effective step 1 weight decay 0.1 effective decay 0.02 per step",
        "gain 4 parameters lr 0.2 effective step 1 weight decay 0 effective decay 0 per step",
        "alpha 1 parameters lr 0.1 effective step 0.5 weight decay 0 effective decay 0 per step",
    ]
    config = replace(CONFIG, name="adamw")
    optimizer = build_optimizer(named(), ROLES, config)
    set_learning_rate(optimizer, 0.0)  # the description is of the peak, whatever the schedule has done
    matrix = " ".join(describe(optimizer, config, SIZES)[2].split())
    assert matrix == "matrix 32 parameters lr 0.2 weight decay 0.1 effective decay 0.02 per step"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"name": "lion", "lr": 1e-3},
            "Lion: betas 0.9 and 0.99, moment stored in fp32, lr 0.001"
            "| matrix 32 parameters lr 0.001 each element moves by 0.001 weight decay 0.1 effective decay 0.0001 per",
        ),
        (
            {"name": "sgd-sai", "lr": 1e-3, "state_dtype": "bf16"},
            "SGD-SaI: momentum 0.9 stored in bf16 rounded stochastically, averaged, eps 1e-08, lr 0.001"
            "| alpha 1 parameters lr 0.0005 effective step 0.0005 x the tensor's g-SNR weight decay 0",
        ),
        (
            {"name": "muon", "lr": 1e-2},
            "Muon: momentum 0.95 stored in fp32, Nesterov, learning rates by match_rms_adamw, lr 0.01"
            "| roles other than matrix: AdamW: betas 0.9 and 0.95, moments stored in fp32, eps 1e-08"
            "| matrix 32 parameters lr 0.01 elements move by 0.002 (root mean square) weight decay 0.1"
            "| gain 4 parameters lr 0.01 weight decay 0",
        ),
        (
            {"name": "muon", "lr": 1e-2, "muon": MuonConfig(adjust_lr="original", others="msgdw", others_lr=0.5)},
            "Muon: momentum 0.95 stored in fp32, Nesterov, learning rates by original, lr 0.01"
            "| roles other than matrix: mSGDW: momentum 0.9 stored in fp32, dampening 0, no Nesterov"
            "| matrix 32 parameters lr 0.01 elements move by 0.005 (root mean square)"
            "| gain 4 parameters lr 0.5 effective step 5 weight decay 0",
        ),
        (
            {"alpha": AlphaControlConfig([1.0, 0.5], [10, 90], [0.1, 2.0], 0.3)},
            "alphas times 1 until step 10, times 0.5 from step 90 on"
            "| alphas stay between 0.1 and 2"
            "| alphas' gradients together are clipped to norm 0.3, before all gradients are",
        ),
    ],
    ids=["lion", "sgd-sai", "muon", "muon, msgdw", "alpha"],
)
def test_describe_says_what_each_optimizer_does(change: dict, says: str) -> None:
    config = replace(CONFIG, **change)
    lines = [" ".join(line.split()) for line in describe(build_optimizer(named(), ROLES, config), config, SIZES)]
    for line in says.split("|"):
        assert any(said.startswith(line.strip()) for said in lines), (line, lines)


def test_muon_elements_move_by_what_is_said_of_matrices_of_several_shapes() -> None:
    config = replace(CONFIG, name="muon", lr=1e-2, lr_factors={}, muon=MuonConfig(adjust_lr="original"))
    held = {"wide": nn.Parameter(torch.zeros(4, 16)), "tall": nn.Parameter(torch.zeros(16, 4))}
    roles = dict.fromkeys(held, "matrix")
    said = describe(build_optimizer(held, roles, config), config, {"wide": 64, "tall": 64})[2]
    assert "elements move by 0.0025 to 0.005 (root mean square)" in said  # 1/4, and twice that for 16 rows on 4


def test_settings_of_other_optimizers_are_not_ignored_in_silence() -> None:
    change = {"beta2": 0.98, "nesterov": True, "muon": MuonConfig(0.9)}
    config = replace(CONFIG, name="lion", **change)
    lines = describe(build_optimizer(named(), ROLES, config), config, SIZES)
    assert [line.strip() for line in lines if "does nothing" in line] == [
        f"optimizer.{key} does nothing with optimizer.name lion" for key in ("nesterov", "beta2", "muon")
    ]
    config = replace(CONFIG, name="muon", **change)
    lines = describe(build_optimizer(named(), ROLES, config), config, SIZES)
    assert [line.split()[0] for line in lines if "does nothing" in line] == ["optimizer.nesterov"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state_dtype": "bf16"}, "momentum 0.9 stored in bf16 rounded stochastically, "),
        ({"state_dtype": "bf16", "state_rounding": "nearest"}, "momentum 0.9 stored in bf16 rounded to nearest, "),
        ({"name": "adamw"}, "moments stored in fp32, "),
        ({"name": "adamw", "state_dtype": "bf16"}, "moments stored in bf16 rounded stochastically, "),
    ],
)
def test_describe_says_how_the_state_is_stored(change: dict, says: str) -> None:
    config = replace(CONFIG, **change)
    assert says in describe(build_optimizer(named(), ROLES, config), config, SIZES)[0]


def test_the_effective_step_is_where_a_constant_gradient_ends() -> None:
    config = replace(CONFIG, dampening=0.5, weight_decay=0.0, lr_factors={})
    parameters = named()
    optimizer = build_optimizer(parameters, ROLES, config)
    for _ in range(300):  # 0.9^300 < 1e-13
        before = parameters["norm.alpha"].item()
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert "effective step 1 " in describe(optimizer, config, SIZES)[1]
    assert before - parameters["norm.alpha"].item() == pytest.approx(1.0, abs=1e-4)  # fp32 near -300


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decay_roles": ["matrx"]}, "did you mean 'matrix'"),
        ({"decay_roles": ["head"]}, "optimizer.decay_roles names 'head'"),
        ({"lr_factors": {"alhpa": 0.1}}, "did you mean 'alpha'"),
        ({"lr_factors": {"shift": 0.1}}, "optimizer.lr_factors names 'shift'"),
        ({"lr_factors": {"alpha": -1.0}}, "optimizer.lr_factors.alpha is -1.0"),
        ({"lr": -0.1}, "optimizer.lr is -0.1"),
        ({"lr": float("inf")}, "optimizer.lr is inf"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay"),
        ({"weight_decay": 5.0}, "of role embedding"),
        ({"momentum": 1.0}, "optimizer.momentum"),
        ({"nesterov": True, "dampening": 0.1}, "optimizer.nesterov"),
        ({"name": "adamw", "beta2": 1.0}, "optimizer.beta2"),
        ({"name": "adamw", "beta1": -0.1}, "optimizer.beta1"),
        ({"name": "adamw", "eps": -1.0}, "optimizer.eps"),
        ({"name": "adamw", "state_dtype": "fp16"}, "optimizer.state_dtype is 'fp16': write fp32 or bf16"),
        ({"state_dtype": "fp16"}, "optimizer.state_dtype is 'fp16': write fp32 or bf16"),
        ({"alpha": AlphaControlConfig(clip=-1.0)}, "optimizer.alpha.clip is -1.0"),
        ({"name": "lion", "lion": LionConfig(beta2=1.0)}, "optimizer.lion.beta2 is 1.0"),
        ({"name": "sgd-sai", "momentum": -0.1}, "optimizer.momentum is -0.1"),
        ({"name": "muon", "muon": MuonConfig(momentum=1.0)}, "optimizer.muon.momentum is 1.0"),
        ({"state_rounding": "up"}, "optimizer.state_rounding is 'up': write stochastic or nearest"),
    ],
)
def test_mistakes_are_one_clear_line(change: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        build_optimizer(named(), ROLES, replace(CONFIG, **change))
    assert "\n" not in str(caught.value)


def test_a_large_factor_on_a_role_that_does_not_decay_is_no_mistake() -> None:
    build_optimizer(named(), ROLES, replace(CONFIG, lr_factors={"alpha": 100.0}))


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({"name": "adamw", "lr": 1.0}, "AdamW usually takes 1e-4 to 1e-2: set optimizer.lr too"),
        ({"name": "adamw", "lr": 3e-3}, ""),
        ({"name": "lion", "lr": 0.2}, "Lion usually takes 1e-5 to 1e-3: set optimizer.lr too"),
        ({"name": "sgd-sai", "lr": 0.2}, "set optimizer.lr too"),
        ({"name": "muon", "lr": 0.2}, "AdamW usually takes 1e-4 to 1e-2: set optimizer.muon.others_lr too"),
        ({"name": "muon", "lr": 0.2, "muon": MuonConfig(others_lr=1e-3)}, ""),
        ({"name": "muon", "lr": 0.2, "muon": MuonConfig(others="msgdw")}, ""),
        ({"name": "msgdw", "lr": 1.0}, ""),
    ],
)
def test_a_learning_rate_of_another_optimizer_is_noticed(change: dict, warned: str) -> None:
    config = OptimizerConfig(**change)
    lines = describe(build_optimizer(named(), ROLES, config), config, SIZES)
    said = [line for line in lines if "usually takes" in line]
    assert len(said) == bool(warned)
    assert all(warned in line for line in said)
