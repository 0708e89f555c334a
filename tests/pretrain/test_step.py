"""The training step: its gradient is that of one big batch written out by hand, however ranks and micro-batches divide
it, in every precision; and nothing in it waits for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import Transformer, parameter_roles
from models.config import AlphaConfig, ModelConfig
from models.initialization import initialize
from pretrain.config import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from pretrain.counts import derive_counts
from pretrain.distributed import World
from pretrain.engines.fsdp import FSDPEngine
from pretrain.step import train_step
from tests.ranks import run_ranks

LENGTH, ROWS, VOCABULARY, EOS = 12, 8, 61, 2
WORLD = World(0, 1, torch.device("cpu"))
Z_LOSS = 0.01

# fp32 gradients of about 1e-2 against fp64 ones: sums of a hundred tokens through two layers, in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


class Watched(FSDPEngine):
    """Keeps the whole gradients that the step finds, before it clips and forgets them."""

    gradients: dict[str, Tensor]

    def step(self, lr: float) -> Tensor:
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.gradients = {name: whole(grad).clone() for name, grad in grads.items()}
        return super().step(lr)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def small(plan: str = "dyt", **sections: Any) -> RunConfig:
    base = RunConfig(
        model=ModelConfig(
            plan=plan,
            width=32,
            depth=2,
            heads=4,
            ffn_width=40,
            vocab_size=VOCABULARY,
            context=LENGTH,
            alpha=AlphaConfig(rule="constant", constant=0.7),
        ),
        data=DataConfig(sequence_length=LENGTH),
        train=TrainConfig(steps=10, batch_tokens=ROWS * LENGTH, micro_batch=2, loss_chunk=7, clip=None),
        optimizer=OptimizerConfig(lr=0.5, momentum=0.0),
        schedule=ScheduleConfig(name="constant"),
    )
    return replace(base, **{key: replace(getattr(base, key), **values) for key, values in sections.items()})


def rows_of_all_ranks() -> Tensor:
    """Documents end at uneven places: in the first half of the rows none does, in the last one nearly every token's."""
    rows = torch.randint(3, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    rows[4, 5] = rows[5, 0] = rows[6, LENGTH] = EOS
    rows[7, 1:10] = EOS
    return rows


def take(config: RunConfig, world: World, steps: int = 1) -> dict[str, Any]:
    """``steps`` steps on the same rows; what is left of them, the same on every rank."""
    engine = Watched(config, world)
    engine.initialize()
    before = {name: whole(p).clone() for name, p in engine.model.named_parameters()}
    counts = derive_counts(config, world.size)
    rows = rows_of_all_ranks()[world.rank :: world.size]
    losses, norms = [], []
    for step in range(steps):
        loss, norm = train_step(engine, rows, step, config, counts, world, EOS)
        losses.append(world.sum(loss.clone()))
        norms.append(norm)
    after = {name: whole(p).clone() for name, p in engine.model.named_parameters()}
    moments = {
        f"{i} {key}": value for i, state in enumerate(engine.optimizer.state.values()) for key, value in state.items()
    }
    return {
        "losses": losses,
        "norms": norms,
        "gradients": engine.gradients,
        "after": after,
        "moved": {name: after[name] - before[name] for name in after},
        "state_dtypes": {key: value.dtype for key, value in moments.items() if isinstance(value, Tensor)},
        "roles": parameter_roles(engine.model),
    }


def take_on_ranks(configs: list[RunConfig], steps: int) -> list[dict[str, Any]]:
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return [take(config, world, steps) for config in configs]


def by_hand(config: RunConfig, masked: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in fp64 through the logits; with a document mask every document goes through alone."""
    model = Transformer(config.model)
    initialize(model, config.model, config.seed)
    model = model.double()
    texts: list[Tensor] = []
    for row in rows_of_all_ranks():
        # An EOS among the inputs ends its document; the token after it is no target.
        cuts = (row[:-1].eq(EOS).nonzero().flatten() + 1).tolist() if masked else []
        texts += [text for text in row.tensor_split(cuts) if len(text) > 1]
    nll, z, targets = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0
    for text in texts:
        logits = model(text[None, :-1])[0]
        nll = nll + F.cross_entropy(logits, text[1:], reduction="sum")
        z = z + logits.logsumexp(dim=1).square().sum()
        targets += len(text) - 1
    ((nll + config.train.z_loss * z)[0] / targets).backward()
    return nll[0].item() / targets, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cases(masked: bool, micro_batches: tuple[int, ...]) -> list[RunConfig]:
    return [
        small(data={"document_mask": masked}, train={"micro_batch": micro, "z_loss": Z_LOSS}) for micro in micro_batches
    ]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_one_big_batch_s(masked: bool, world_size: int) -> None:
    """Also where micro-batches and ranks have unequally many targets, and with the z-loss in the gradients alone."""
    configs = cases(masked, (8, 4, 2, 1) if world_size == 1 else (4, 1))
    if world_size == 1:
        found = [take(config, WORLD) for config in configs]
    else:
        found = [one for rank in run_ranks(take_on_ranks, world_size, configs, 1) for one in rank]
    loss, gradients = by_hand(configs[0], masked)
    norm = torch.stack([grad.norm() for grad in gradients.values()]).norm()
    for one in found:
        assert one["gradients"].keys() == gradients.keys()
        for name, expected in gradients.items():
            torch.testing.assert_close(
                one["gradients"][name].double(), expected, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert one["losses"][0].item() == pytest.approx(loss, rel=1e-5)
        assert one["norms"][0].item() == pytest.approx(norm.item(), rel=1e-5)
        for name, moved in one["moved"].items():  # plain SGD here: what was clipped, averaged or kept would show
            torch.testing.assert_close(moved.double(), -0.5 * gradients[name], **CLOSE)


def test_z_loss_is_in_the_gradients_and_not_in_the_loss() -> None:
    with_z, without = take(small(train={"z_loss": Z_LOSS}), WORLD), take(small(), WORLD)
    assert with_z["losses"] == without["losses"]
    difference = with_z["gradients"]["head.weight"] - without["gradients"]["head.weight"]
    assert difference.norm() > 1e-2 * without["gradients"]["head.weight"].norm()


@pytest.mark.parametrize("world_size", [1, 2])
def test_clipping_is_by_the_global_norm(world_size: int) -> None:
    def moves(one: dict[str, Any]) -> float:
        return torch.stack([moved.norm() for moved in one["moved"].values()]).norm().item() / 0.5

    free = small()
    norm = take(free, WORLD)["norms"][0].item()
    configs = [small(train={"clip": clip}) for clip in (norm / 3, norm * 3)]
    if world_size == 1:
        clipped, loose = [take(config, WORLD) for config in configs]
    else:
        clipped, loose = run_ranks(take_on_ranks, world_size, configs, 1)[1]
    for one in (clipped, loose):
        assert one["norms"][0].item() == pytest.approx(norm, rel=1e-5), "reported as it was before clipping"
    # A weight of 1 moved by 1e-3 has lost the last 1e-7 of itself, a ten-thousandth of the move.
    assert moves(clipped) == pytest.approx(norm / 3, rel=1e-3)
    assert moves(loose) == pytest.approx(norm, rel=1e-3)


def test_grad_op_is_full() -> None:
    """They differ in memory and in when gradients are summed over the ranks, after each micro-batch or after all."""
    configs = [
        replace(small(optimizer={"momentum": 0.9}), parallel=ParallelConfig(shard=s)) for s in ("full", "grad_op")
    ]
    full, grad_op = run_ranks(take_on_ranks, 2, configs, 3)[0]
    torch.testing.assert_close(grad_op["losses"], full["losses"], rtol=1e-6, atol=0)
    assert full["losses"][2] < full["losses"][0]
    for name, value in full["gradients"].items():
        torch.testing.assert_close(grad_op["gradients"][name], value, **CLOSE)


@pytest.mark.parametrize("plan", ["dyt", "dnt"])
@pytest.mark.parametrize("optimizer", ["msgdw", "adamw"])
def test_bf16_computes_and_fp32_keeps(plan: str, optimizer: str) -> None:
    update = {"name": optimizer, "lr": 0.1 if optimizer == "msgdw" else 1e-3, "momentum": 0.9}
    config = small(plan, optimizer=update)
    low_config = replace(config, precision=PrecisionConfig("bf16"))
    wide, low = take(config, WORLD, steps=3), take(low_config, WORLD, steps=3)
    assert {value.dtype for value in (*low["after"].values(), *low["gradients"].values())} == {torch.float32}
    assert set(low["state_dtypes"].values()) == {torch.float32}
    assert {value.dtype for value in (*low["losses"], *low["norms"])} == {torch.float32}
    for one, other in zip(low["losses"], wide["losses"], strict=True):
        # bf16 keeps 8 bits: logits of about 1 are off by 4e-3 each, the mean of a hundred losses by less.
        assert one.item() == pytest.approx(other.item(), rel=4e-3)
    assert low["losses"][-1] != wide["losses"][-1], "bf16 was asked for"
    roles = low["roles"]
    expected, found = take(config, WORLD)["gradients"], take(low_config, WORLD)["gradients"]
    for role in set(roles.values()):
        there, here = (
            torch.cat([grads[name].flatten() for name in roles if roles[name] == role]) for grads in (expected, found)
        )
        # A dozen bf16 roundings between the loss and the first block, each of 4e-3; alphas sum terms of both signs.
        error = (here - there).norm() / there.norm()
        assert 0 < error < 0.05, f"{role}: off by {error:.3f}"


class Waits(AssertionError):
    """The host asked for a value on the device."""


class NoSynchronization(TorchDispatchMode):
    """Every operator by which the host learns a value or a size that only the device knows."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in self.FORBIDDEN:
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x[x > 0], float, torch.nonzero])
def test_a_wait_would_be_seen(value: Any) -> None:
    with pytest.raises(Waits), NoSynchronization():
        value(torch.ones(1))


@pytest.mark.parametrize("plan", ["dyt", "dnt"])
@pytest.mark.parametrize("optimizer", ["msgdw", "adamw"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_nothing_waits_for_the_device(plan: str, optimizer: str, masked: bool, compute: Any) -> None:
    config = small(plan, optimizer={"name": optimizer}, data={"document_mask": masked}, train={"clip": 1.0})
    config = replace(config, precision=PrecisionConfig(compute))
    engine = FSDPEngine(config, WORLD)
    engine.initialize()
    counts = derive_counts(config, 1)
    for step in range(2):  # the first makes the optimizer's state
        with NoSynchronization():
            train_step(engine, rows_of_all_ranks(), step, config, counts, WORLD, EOS)


def test_matrix_products_are_in_bf16() -> None:
    config = replace(small(), precision=PrecisionConfig("bf16"))
    engine = FSDPEngine(config, WORLD)
    engine.initialize()
    seen: dict[str, torch.dtype] = {}
    for name, module in engine.model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.dtype}))
    train_step(engine, rows_of_all_ranks(), 0, config, derive_counts(config, 1), WORLD, EOS)
    assert len(seen) == 2 * 7
    assert set(seen.values()) == {torch.bfloat16}
