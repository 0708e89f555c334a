"""The gradient noise scale: unbiased where the gradient and its covariance are known, and in a step by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import parameter_roles
from models.loss import IGNORE
from pretrain.batch import make_batch
from pretrain.counts import derive_counts
from pretrain.engines import build_engine
from pretrain.step import train_step
from pretrain.telemetry.noise import noise_scale
from pretrain.telemetry.sites import numbers
from pretrain.telemetry.step_watch import WEIGHTS, StepWatch
from tests.pretrain.engine_runs import batch_of, config_of, here


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@given(st.floats(0.1, 10), st.floats(0.1, 1e4), st.integers(1, 50), st.integers(51, 1000))
def test_expectations_give_back_what_they_are_made_of(signal: float, trace: float, part: int, whole: int) -> None:
    """From E|G_B|^2 = |G|^2 + tr(Sigma) / B of two B."""
    found = noise_scale(number(signal + trace / part), number(part), number(signal + trace / whole), number(whole))
    # cancellation: the difference is down to 1/51 of terms that are 1e5 times as large as the signal
    assert found.gradient_squared.item() == pytest.approx(signal, rel=1e-6)
    assert found.covariance_trace.item() == pytest.approx(trace, rel=1e-6)
    assert found.scale.item() == pytest.approx(trace / signal, rel=1e-6)


def test_it_is_unbiased_on_gaussian_gradients() -> None:
    """4000 batches of 32 gradients N(mu, diag(1 .. 10)): |mu|^2 = 10, tr(Sigma) = 55."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, 11, dtype=torch.float64).sqrt()
    gradients = 1.0 + torch.randn(4000, 32, 10, generator=generator, dtype=torch.float64) * deviations
    part = gradients[:, :8].mean(1).square().sum(-1)
    whole = gradients.mean(1).square().sum(-1)
    found = noise_scale(part, number(8), whole, number(32))
    for estimates, expected in ((found.gradient_squared, 10.0), (found.covariance_trace, 55.0)):
        error = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean() - expected) < 4 * error
        assert error < 0.02 * expected, "the test would notice a bias of a tenth"
    assert (found.gradient_squared.mean() / 10 - 1).abs() < 0.1


def test_a_negative_signal_has_no_scale() -> None:
    found = noise_scale(number(9.0), number(1), number(1.0), number(2))
    assert found.gradient_squared < 0
    assert found.covariance_trace == 16
    assert found.scale.isnan()


@pytest.mark.parametrize("masked", [False, True])
def test_of_a_step_by_hand(masked: bool) -> None:
    """Mean gradients over the targets of two sequences and of all eight, from autograd alone."""
    eos = 48  # some tokens of every part, whose next ones are no targets under the mask
    config = config_of(train={"micro_batch": 2}, data={"document_mask": masked})
    engine = build_engine(config, here())
    engine.initialize()
    rows = batch_of(0)
    weights = [p for name, p in engine.model.named_parameters() if parameter_roles(engine.model)[name] in WEIGHTS]
    squared, targets = [], []
    for part in (rows[:2], rows):
        batch = make_batch(part, eos, masked)
        count = int(batch.targets.ne(IGNORE).sum())
        objective, _ = engine.model(batch.inputs, batch.targets, batch.documents)
        grads = torch.autograd.grad(objective / count, weights)
        squared.append(sum(grad.double().square().sum() for grad in grads))
        targets.append(count)
    assert (targets[1] < rows[:, 1:].numel()) == masked
    expected = noise_scale(squared[0], number(targets[0]), squared[1], number(targets[1]))
    watch = StepWatch(engine, here(), ["noise"])
    train_step(engine, rows, 0, config, derive_counts(config, 1), here(), eos, watch)
    found = numbers(watch.results())
    assert found == {
        "noise_gradient_squared": pytest.approx(expected.gradient_squared.item(), rel=1e-4),  # fp32 gradients
        "noise_covariance_trace": pytest.approx(expected.covariance_trace.item(), rel=1e-4),
        "noise_scale": pytest.approx(expected.scale.item(), rel=1e-4, nan_ok=True),
    }
