"""AdamW with bf16 moments against torch's with fp32 ones."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.optimizers import CompactAdamW, slices
from pretrain.optimizers.storage import Rounding
from tests.pretrain import stepping

SHAPES = [(16, 4), (1,), (96,), (0, 5)]
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


parameters = partial(stepping.parameters, SHAPES)
gradients = partial(stepping.gradients, SHAPES)
train = partial(stepping.train, gradients=gradients, lr=lambda step: 0.03 / (1 + step))


def give(held: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, gradient in zip(held, values, strict=True):
        parameter.grad = gradient


@pytest.mark.parametrize("chunk", [32, 2**18])
def test_nearest_is_torchs_step_and_one_rounding_of_each_moment(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise: torch's own optimizer with its state rounded by hand after every step. In pieces of 32 elements too:
    whole vectors of any CPU, so that the kernel's other loop, for a remainder, is not taken where torch does not."""
    monkeypatch.setattr(slices, "CHUNK_ELEMENTS_CPU", chunk)
    ours, theirs = parameters(), parameters()
    optimizer = CompactAdamW(ours, 0.1, state_rounding="nearest", **SETTINGS)
    reference = torch.optim.AdamW(theirs, 0.1, fused=True, **SETTINGS)
    for step in range(6):
        train(optimizer, range(step, step + 1))
        train(reference, range(step, step + 1))
        for parameter in theirs:
            for name in ("exp_avg", "exp_avg_sq"):
                moment = reference.state[parameter][name]
                moment.copy_(moment.bfloat16())
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        mine, other = optimizer.state[a], reference.state[b]
        assert list(mine) == ["exp_avg", "exp_avg_sq", "step"]
        assert mine["step"] == other["step"] == 6
        assert all(torch.equal(mine[name].float(), other[name]) for name in mine)


@pytest.mark.parametrize(("rounding", "unit"), [("nearest", 2.0**-8), ("stochastic", 2.0**-7)])
def test_it_stays_near_fp32_as_the_roundings_allow(rounding: Rounding, unit: float) -> None:
    """One rounding changes a number by ``unit`` of it at most. Where an element's gradients have one sign, both moments
    are sums of terms of one sign, each rounded t - 1 times before step t uses it. The quotient of one by the root of
    the other is then off by at most (1 + u)^(t-1) / (1 - u)^((t-1)/2) - 1 of itself; weight decay only shrinks that.
    """
    steps = 20
    signs = [gradient.sign() for gradient in gradients(99)]
    ours, theirs = parameters(), parameters()
    optimizer = CompactAdamW(ours, 0.01, state_rounding=rounding, **SETTINGS)
    reference = torch.optim.AdamW(theirs, 0.01, fused=True, **SETTINGS)
    bounds = [torch.zeros_like(parameter) for parameter in theirs]
    for step in range(steps):
        before = [parameter.detach() * (1 - 0.01 * 0.1) for parameter in theirs]
        values = [gradient.abs() * sign for gradient, sign in zip(gradients(step), signs, strict=True)]
        give(ours, values)
        give(theirs, [value.clone() for value in values])
        optimizer.step()
        reference.step()
        off = (1 + unit) ** step / (1 - unit) ** (step / 2) - 1
        for bound, old, new in zip(bounds, before, theirs, strict=True):
            bound += off * (new.detach() - old).abs() + 1e-6  # fp32's own roundings of numbers near 1
    for mine, other, bound in zip(ours, theirs, bounds, strict=True):
        assert ((mine - other).abs() <= bound).all()
    assert not torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_state_dict_keeps_every_bit(rounding: Rounding) -> None:
    held = parameters()
    optimizer = CompactAdamW(held, 0.1, state_rounding=rounding)
    train(optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = parameters()
    for copy, parameter in zip(copies, held, strict=True):
        copy.data.copy_(parameter.data)
    other = CompactAdamW(copies, 0.1, state_rounding=rounding)
    other.load_state_dict(torch.load(file, weights_only=True))
    for parameter, copy in zip(held, copies, strict=True):
        for name, value in optimizer.state[parameter].items():
            assert other.state[copy][name].dtype == value.dtype
            assert torch.equal(other.state[copy][name], value)
    train(optimizer, range(3, 6))
    train(other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_torchs_adamw_and_this_one_load_each_other() -> None:
    def groups() -> list[dict[str, list[nn.Parameter]]]:
        first, *others = parameters()
        return [{"params": [first]}, {"params": others}]

    reference, optimizer = torch.optim.AdamW(groups(), 0.1, fused=True), CompactAdamW(groups(), 0.1)
    back = torch.optim.AdamW(groups(), 0.1, fused=True)
    train(reference, range(3))
    optimizer.load_state_dict(reference.state_dict())
    back.load_state_dict(optimizer.state_dict())
    theirs, ours, returned = (list(o.state_dict()["state"].values()) for o in (reference, optimizer, back))
    assert len(theirs) == len(ours) == len(returned) == len(SHAPES)
    for expected, state, again in zip(theirs, ours, returned, strict=True):
        assert state["step"] == again["step"] == 3
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], expected[name].bfloat16())
            assert torch.equal(again[name], expected[name].bfloat16().float())
    train(optimizer, range(3, 5))
    # Torch's groups have no noise: each went on with its own.
    assert [group["noise"] for group in optimizer.param_groups] == [2, 2**32 + 2]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList(parameters())


def optimizer_of(model: nn.Module, rounding: Rounding) -> CompactAdamW:
    held = list(model.named_parameters())
    groups = [{"params": held[:2], "role": "matrix"}, {"params": held[2:], "role": "gain"}]
    return CompactAdamW(groups, 0.1, state_rounding=rounding)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_resume_through_distributed_state_dict_is_bitwise(rounding: Rounding, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    whole = Small()
    train(optimizer_of(whole, rounding), range(6))

    first = Small()
    optimizer = optimizer_of(first, rounding)
    train(optimizer, range(3))
    saved = get_optimizer_state_dict(first, optimizer, options=options)

    second = Small()
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second, rounding)
    set_optimizer_state_dict(second, resumed, saved, options=options)
    assert all(state["exp_avg_sq"].dtype == torch.bfloat16 for state in resumed.state.values())
    assert [group["role"] for group in resumed.param_groups] == ["matrix", "gain"]
    if rounding == "stochastic":
        assert [group["noise"] for group in resumed.param_groups] == [3, 2**32 + 3]
    train(resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


class RefuseReadback(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_step_reads_nothing_back(rounding: Rounding) -> None:
    optimizer = CompactAdamW(parameters(), 0.1, state_rounding=rounding)
    with RefuseReadback():
        train(optimizer, range(2))
        with pytest.raises(AssertionError):
            torch.ones(1).item()  # the mode does see a readback


def test_groups_whose_parameters_are_replaced_by_flat_partitions() -> None:
    """As ZeRO does it: one 1-D tensor a group, perhaps of no elements, and one group at a time before ``step``."""
    held = parameters()
    optimizer = CompactAdamW([{"params": [p]} for p in held], 0.1, **SETTINGS)
    partitions = [nn.Parameter(torch.full((n,), 0.5)) for n in (1000, 0, 1000)]
    groups = optimizer.param_groups = optimizer.param_groups[:3]
    for group, partition in zip(groups, partitions, strict=True):
        group["params"] = [partition]
    for _ in range(3):
        for group, partition in zip(groups, partitions, strict=True):
            partition.grad = torch.full_like(partition, 0.3)
            optimizer.param_groups = [group]
            optimizer.step()
    assert [optimizer.state[partition]["step"].item() for partition in partitions] == [3, 3, 3]
    first, _, last = (optimizer.state[partition]["exp_avg"] for partition in partitions)
    assert len(first.unique()) > 1
    assert not torch.equal(first, last)  # each group has noise of its own


def test_a_parameter_without_gradient_is_left_alone() -> None:
    moved, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    moved.grad = torch.ones(2)
    optimizer = CompactAdamW([moved, still], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert still not in optimizer.state
