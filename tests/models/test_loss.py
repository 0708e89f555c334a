"""The chunked cross-entropy: value and gradients of torch's own, and never the logits of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.loss import IGNORE, cross_entropy_sum
from tests.models.building import build, randn, tiny, tokens


def inputs(rows: int, vocabulary: int, seed: int, ignored: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORE
    hidden, weight = (
        randn(rows, 5, seed=seed, dtype=torch.float64),
        randn(vocabulary, 5, seed=seed + 1, dtype=torch.float64),
    )
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return nll + z_loss * (torch.logsumexp(logits, 1)[targets != IGNORE] ** 2).sum(), nll


@settings(max_examples=40)
@given(
    rows=st.integers(1, 20),
    vocabulary=st.integers(2, 17),
    chunk=st.integers(1, 25),
    z_loss=st.sampled_from([0.0, 1e-4, 0.5]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients(rows: int, vocabulary: int, chunk: int, z_loss: float, ignored: float, seed: int) -> None:
    hidden, weight, targets = inputs(rows, vocabulary, seed, ignored)
    objective, nll = cross_entropy_sum(hidden, weight, targets, z_loss, chunk)
    expected, plain = reference(hidden, weight, targets, z_loss)
    torch.testing.assert_close((objective, nll), (expected, plain))
    factor = 0.37  # a gradient other than 1 comes in
    ours = torch.autograd.grad(factor * objective, (hidden, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(factor * expected, (hidden, weight)))
    assert not nll.requires_grad


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradcheck(z_loss: float) -> None:
    hidden, weight, targets = inputs(7, 5, seed=3)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy_sum(h, w, targets, z_loss, 3)[0], (hidden, weight))


def test_without_gradients_it_is_the_same_value() -> None:
    hidden, weight, targets = inputs(9, 7, seed=4)
    with torch.no_grad():
        value = cross_entropy_sum(hidden, weight, targets, 0.1, 4)
    torch.testing.assert_close(value, reference(hidden, weight, targets, 0.1))


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(9, 7, seed=5)
    hidden, weight = (hidden.detach() * 1e4).float().requires_grad_(), weight.detach().float().requires_grad_()
    objective, _ = cross_entropy_sum(hidden, weight, targets, 0.0, 4)
    expected, _ = reference(hidden, weight, targets, 0.0)
    torch.testing.assert_close(objective, expected)
    for gradient in torch.autograd.grad(objective, (hidden, weight)):
        assert gradient.isfinite().all()


def test_bf16_hidden_states_sum_in_fp32() -> None:
    """4,000 terms of about 2: a bf16 sum would stop growing at 512. Rounded logits leave a relative 2^-9 at most."""
    hidden, weight, targets = inputs(4000, 7, seed=6)
    low = hidden.detach().bfloat16().requires_grad_()
    master = weight.detach().float().requires_grad_()
    objective, nll = cross_entropy_sum(low, master, targets, 0.0, 256)
    assert (objective.dtype, nll.dtype) == (torch.float32, torch.float32)
    expected, _ = reference(low.detach().double(), weight.detach(), targets, 0.0)
    torch.testing.assert_close(objective.double(), expected, rtol=2**-9, atol=0)
    objective.backward()
    assert low.grad is not None
    assert master.grad is not None
    assert (low.grad.dtype, master.grad.dtype) == (torch.bfloat16, torch.float32)
    h, w = low.detach().double().requires_grad_(), weight.detach().clone().requires_grad_()
    reference(h, w, targets, 0.0)[0].backward()
    assert h.grad is not None
    assert w.grad is not None
    assert (low.grad.double() - h.grad).norm() / h.grad.norm() < 0.01  # a few bf16 roundings of 2^-9 each
    assert (master.grad.double() - w.grad).norm() / w.grad.norm() < 0.01


@pytest.mark.parametrize("trunk", ["llama", "gpt"])
def test_the_model_returns_it(trunk: str) -> None:
    model = build(tiny(trunk=trunk, plan="dnt"), dtype=torch.float64)
    ids, targets = tokens(), tokens(seed=1)
    targets[0, 3:6] = IGNORE
    objective, nll = model(ids, targets, z_loss=0.01, loss_chunk=5)
    logits = model(ids)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    z = (torch.logsumexp(logits, -1)[targets != IGNORE] ** 2).sum()
    torch.testing.assert_close((objective, nll), (plain + 0.01 * z, plain))
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(objective, parameters)
    theirs = torch.autograd.grad(plain + 0.01 * z, parameters)
    torch.testing.assert_close(dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True)))


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_the_full_logits_never_exist() -> None:
    rows, vocabulary, chunk = 640, 101, 8
    model = build(tiny(vocab_size=vocabulary, depth=1, context=64))
    ids = tokens(rows // 64, 64)
    with Largest() as chunked:
        model(ids, tokens(rows // 64, 64, seed=1), loss_chunk=chunk)[0].backward()
    widest_activation = rows * 40
    assert chunked.elements <= widest_activation < rows * vocabulary
    with Largest() as whole:  # the measure itself sees them where they are
        model(ids)
    assert whole.elements >= rows * vocabulary
