"""What tools.inspect says of weights and gradients, against numpy, plain autograd and what norms promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from models.loss import IGNORE
from tests.tools.inspecting import QUIET, make_subject
from tools.inspecting.gradients import look_at_gradients
from tools.inspecting.invariance import FACTORS, look_at_invariance
from tools.inspecting.spectra import look_at_spectra
from tools.inspecting.subject import Subject


def test_spectra_are_numpy_s() -> None:
    """fp32 against fp64: singular values are within a few roundings of the largest."""
    subject = make_subject(plan="dnt", kv_heads=2)
    found = look_at_spectra(subject, QUIET)
    assert found.normalized
    named = dict(subject.model.named_parameters())
    assert {one.name for one in found.weights} >= {"blocks.0.attention.q.weight", "blocks.1.feedforward.down.weight"}
    for one in found.weights:
        expected = np.linalg.svd(named[one.name].detach().double().numpy(), compute_uv=False)
        assert one.values.numpy() == pytest.approx(expected, abs=1e-5 * expected[0])
        assert one.stable_rank == pytest.approx((expected**2).sum() / expected[0] ** 2, rel=1e-5)


def test_scores_are_of_each_head_and_its_group() -> None:
    subject = make_subject(plan="llama", kv_heads=2)  # four heads of width 8, two to a key head
    found = look_at_spectra(subject, QUIET)
    assert not found.normalized
    for block in found.scores:
        attention = subject.model.get_submodule(f"blocks.{block.block}.attention")
        q, k = (attention.get_submodule(name).weight.detach().double().numpy() for name in ("q", "k"))
        for head in range(4):
            group = head // 2
            product = q[8 * head : 8 * head + 8].T @ k[8 * group : 8 * group + 8]
            expected = np.linalg.svd(product, compute_uv=False)[:8]
            assert block.sigma[head].numpy() == pytest.approx(expected, abs=1e-5 * expected[0])


def weights_of(subject: Subject) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in subject.model.named_parameters()}


@pytest.mark.parametrize(
    ("plan", "promised"),
    [
        ("llama", set()),
        ("dyt", set()),
        ("dnt-s2", {"q", "k"}),
        ("dnt", {"embedding", "q", "k", "v", "out", "up", "down", "input"}),
    ],
)
def test_what_norms_promise_holds_and_nothing_else_does(plan: str, promised: set[str]) -> None:
    """The promise is up to the norms' epsilon, 1e-5 beside mean squares of about 1 here, times factors of 4."""
    subject = make_subject(plan=plan, tied=False)
    before = weights_of(subject)
    found = look_at_invariance(subject, QUIET)
    assert {row.kind for row in found.rows if row.exact} == promised
    for row in found.rows:
        assert len(row.losses) == len(FACTORS)
        worst = max(abs(loss - found.loss) for loss in row.losses)
        assert (worst < 1e-4) if row.exact else (worst > 1e-4), row.kind
    assert all(torch.equal(before[name], p) for name, p in subject.model.named_parameters()), "left as it was"


def test_gradients_are_those_of_the_whole_batch() -> None:
    subject = make_subject(plan="llama", tied=False)
    found = look_at_gradients(subject, QUIET)
    batch = subject.training
    model, count = subject.model, len(batch.inputs)
    targets = batch.targets.ne(IGNORE).sum()
    single = []
    for i in range(count):
        model.zero_grad()
        objective, _ = model(batch.inputs[i : i + 1], batch.targets[i : i + 1])
        (objective * count / targets).backward()
        single.append(
            {name: p.grad.double().numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
        )
    mean = {name: sum(g[name] for g in single) / count for name in single[0]}
    for one in found.weights:
        gradient = mean[one.name]
        if one.kind == "embedding":
            gradient = gradient[(gradient != 0).any(axis=1)]
        assert one.rms == pytest.approx(np.sqrt((gradient**2).mean()), rel=1e-4), one.name
        assert one.kurtosis == pytest.approx(stats.kurtosis(gradient.ravel(), fisher=False), rel=1e-3), one.name
        noise = np.stack([g[one.name] - mean[one.name] for g in single]).ravel()
        assert one.noise_kurtosis == pytest.approx(stats.kurtosis(noise, fisher=False), rel=1e-3), one.name
    flat = np.stack([np.concatenate([g[name].ravel() for name in mean]) for g in single])
    norms = np.linalg.norm(flat - flat.mean(axis=0), axis=1)
    assert found.norms == pytest.approx(norms, rel=1e-4)
    # An unbiased trace of the covariance of one sequence's gradient is that of the samples.
    assert found.noise.trace == pytest.approx(flat.var(axis=0, ddof=1).sum(), rel=1e-4)
    squared = (flat.mean(axis=0) ** 2).sum() - found.noise.trace / count
    assert found.noise.gradient_squared == pytest.approx(squared, rel=1e-3, abs=1e-6)
