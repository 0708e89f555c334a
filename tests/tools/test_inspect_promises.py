"""Measures of tools.inspect in every plan: scaling, tails and noise, against promises by hand and brute force."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import PLANS
from pretrain.batch import make_batch
from tests.tools.inspecting import QUIET, make_subject
from tools.inspecting.gradients import batch_noise, look_at_gradients
from tools.inspecting.history import look_at_history
from tools.inspecting.invariance import INPUT, look_at_invariance, promised, scaled_by
from tools.inspecting.spectra import effective_weight, look_at_spectra
from tools.inspecting.subject import Subject, mean_loss, weights


@pytest.mark.parametrize("trunk", ["llama", "gpt"])
@pytest.mark.parametrize("plan", PLANS)
def test_promises_are_kept_and_none_is_missing(plan: str, trunk: str) -> None:
    """In every plan the kinds that are promised change nothing beyond fp32's rounding, and all others do."""
    subject = make_subject(plan=plan, trunk=trunk, norm_eps=1e-12)
    found = look_at_invariance(subject, QUIET)
    assert {row.kind for row in found.rows} == {one.kind for one in weights(subject.model)} | {INPUT}
    assert found.loss == mean_loss(subject, subject.held_out)
    for row in found.rows:
        changes = [abs(loss - found.loss) for loss in row.losses]
        # fp32 rounds a loss of some nats by about 1e-6, and differently for factors that are no powers of two
        assert (max(changes) < 1e-4) == row.exact, (row.kind, changes)


def test_promises_by_hand() -> None:
    """What the norms of a plan take out; a bias or a bend in between, or a block without the norm, breaks it."""

    def of(**model: Any) -> set[str]:
        return promised(make_subject(**model).model)

    assert of(plan="dnt", tied=True) == {"q", "k", "v", "out", "up", "down", INPUT}, "the head has no norm behind it"
    assert of(plan="dnt", trunk="gpt", tied=False) == {"q", "k", "v", "out", "down", INPUT}, (
        "GELU bends; positions stay"
    )
    assert of(plan="dnt", bias=True) == {"q", "k", "out", "down", "embedding", INPUT}, "a bias stays as it is"
    assert of(plan="sub-ln") == {"v", "up"}
    assert of(plan="hybridnorm-star") == {"q", "k", "v"}
    assert of(plan="mix-ln", depth=4) == set()
    assert of(plan="llama", first_blocks=1, first_sites={"query": "rmsnorm"}) == set(), "one block is not all"
    assert of(plan="nf") == {"q", "k", "v", "out", "gate", "up", "down"}
    assert of(plan="llama", sites={"query": {"function": "hardtanh", "alpha": 100.0}}) == set()


def test_a_scaled_model_is_scaled() -> None:
    """A linear gives so many times as much, bias included; the input is that of the first block, positions included."""
    subject = make_subject(plan="llama", bias=True)
    layer = subject.model.get_submodule("blocks.1.feedforward.down")
    assert isinstance(layer, nn.Linear)
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        with scaled_by(subject.model, "down", 0.5):
            half = layer(x)
        torch.testing.assert_close(2 * half, layer(x))
    gpt = make_subject(plan="gpt", trunk="gpt")
    seen: list[torch.Tensor] = []
    gpt.model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        gpt.model(*gpt.held_out)
        with scaled_by(gpt.model, INPUT, 1.25):
            gpt.model(*gpt.held_out)
    torch.testing.assert_close(seen[1], 1.25 * seen[0])


def test_tails_do_not_know_the_scale_of_the_gradient() -> None:
    """A norm behind a weight that is 8 times as large makes its gradient 8 times smaller, and no tail lighter."""
    subject = make_subject(plan="dnt", norm_eps=1e-12)
    before = look_at_gradients(subject, QUIET).weights
    with scaled_by(subject.model, "q", 8.0):
        after = look_at_gradients(subject, QUIET).weights
    for old, new in zip(before, after, strict=True):
        if old.kind == "q":
            assert new.rms == pytest.approx(old.rms / 8, rel=1e-3)
            for measure in ("kurtosis", "hill", "ratio", "noise_kurtosis"):
                assert getattr(new, measure) == pytest.approx(getattr(old, measure), rel=1e-3)
            assert new.quantiles == pytest.approx(old.quantiles, rel=1e-3)


def gradients_by_hand(subject: Subject) -> np.ndarray:
    """[sequences, elements of all parameters], g_i by PyTorch's own cross entropy over all logits."""
    batch = subject.training
    assert batch.documents is not None
    count, targets = len(batch.inputs), (batch.targets >= 0).sum()
    rows = []
    for i in range(count):
        logits = subject.model(batch.inputs[i : i + 1], documents=batch.documents[i : i + 1])[0]
        loss = F.cross_entropy(logits, batch.targets[i], reduction="sum") * count / targets
        parts = torch.autograd.grad(loss, list(subject.model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]).double().numpy())
    return np.stack(rows)


def noise_by_hand(g: np.ndarray) -> float:
    """B_simple in sequences, of arXiv 1812.06162, appendix A.1, with B_small 1 and B_big all."""
    n = len(g)
    small, big = (g**2).sum(1).mean(), (g.mean(0) ** 2).sum()
    return float((small - big) / (1 - 1 / n) / ((n * big - small) / (n - 1)))


def test_noise_of_documents_is_brute_force_s() -> None:
    """Sequences of several documents have different numbers of targets; G is the mean over all targets. The error
    leaves out one sequence at a time, and has no bound where one of them decides whether there is a gradient."""
    subject = make_subject(sequences=6, plan="llama", documents=True)
    lost = noise_by_hand(np.delete(gradients_by_hand(subject), 4, axis=0))
    assert lost < 0, "this seed's, without one of its sequences"
    assert math.isinf(look_at_gradients(subject, QUIET).noise.error)
    subject = make_subject(sequences=6, plan="llama", documents=True)
    rows = torch.randint(1, 50, (1, 25)).repeat(6, 1)  # alike but for their beginnings: more gradient than noise
    rows[:, :8] = torch.randint(50, (6, 8))
    rows[2, 3] = rows[4, 5] = rows[4, 12] = 0
    subject.training = make_batch(rows, 0, True)
    assert len(set(subject.training.targets.ge(0).sum(1).tolist())) > 1
    found = look_at_gradients(subject, QUIET)
    g = gradients_by_hand(subject)
    assert found.norms == pytest.approx(np.linalg.norm(g - g.mean(0), axis=1).tolist(), rel=1e-4)
    left_out = np.array([noise_by_hand(np.delete(g, i, axis=0)) for i in range(6)])
    assert noise_by_hand(g) > 0
    assert (left_out > 0).all()
    assert found.noise.scale == pytest.approx(24 * noise_by_hand(g), rel=1e-3)
    assert found.noise.error == pytest.approx(24 * np.sqrt(5 * left_out.var()), rel=1e-2)


def test_the_noise_scale_of_known_gradients() -> None:
    """|G|^2 = 1 and tr(Sigma) = 500 over 4,000 draws in 1,000 dimensions: 500 sequences of 10 tokens. |G|^2 is seen to
    2 sqrt(tr / (D N)) + tr / N sqrt(2 / D) = 3 %, and the error says so."""
    generator = np.random.default_rng(0)
    g = 1000**-0.5 + generator.normal(0, math.sqrt(0.5), (4000, 1000))
    total = g.mean(0)
    squared, inner = torch.from_numpy((g**2).sum(1)), torch.from_numpy(g @ total)
    found = batch_noise(squared, inner, torch.tensor((total**2).sum()), 10)
    assert found.scale == pytest.approx(5000, rel=0.12)
    assert found.gradient_squared == pytest.approx(1, rel=0.12)
    assert found.trace == pytest.approx(500, rel=0.01)
    assert 0.01 < found.error / found.scale < 0.06
    opposite = batch_noise(torch.ones(2).double(), torch.zeros(2).double(), torch.zeros(()).double(), 10)
    assert math.isnan(opposite.scale), "two opposite gradients have no mean to speak of"


def test_z_loss_is_part_of_the_objective() -> None:
    subject = make_subject(plan="llama")
    without = look_at_gradients(subject, QUIET).weights[-1].rms
    subject.config = replace(subject.config, train=replace(subject.config.train, z_loss=1.0))
    assert look_at_gradients(subject, QUIET).weights[-1].rms != pytest.approx(without, rel=1e-2)


@pytest.mark.parametrize("weight", ["standardized", "sigma"])
def test_the_spectrum_is_of_the_weight_that_multiplies(weight: str) -> None:
    subject = make_subject(plan="none", weights=weight, bias=True)
    linear = subject.model.get_submodule("blocks.0.attention.q")
    assert isinstance(linear, nn.Linear)
    x = torch.randn(7, 32)
    with torch.no_grad():
        expected = x @ effective_weight(linear).mT + linear.bias
        torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-4)
        values = torch.linalg.svdvals(effective_weight(linear))
    (one,) = (one for one in look_at_spectra(subject, QUIET).weights if one.name == "blocks.0.attention.q.weight")
    torch.testing.assert_close(one.values, values, atol=1e-5, rtol=1e-4)


def test_what_was_logged_is_read() -> None:
    """By metric and name, without gaps; the noise scale is a quotient of averages, which is not the average of
    quotients, and is left out where |G|^2 is no more than its own noise."""
    records: list[dict[str, Any]] = [
        {"step": step, "loss": 1.0, "alpha/final": 0.1 * step, "grad_hill/a": None if step == 2 else 3.0}
        | {"noise_gradient_squared": squared, "noise_covariance_trace": 10.0, "noise_scale": None}
        for step, squared in ((1, -1.0), (2, 3.0), (3, 6.0))
    ]
    found = look_at_history(make_subject(plan="llama", records=records), QUIET)
    assert set(found) == {"alpha", "grad_hill", "noise_scale"}
    assert found["grad_hill"] == {"a": [(1, 3.0), (3, 3.0)]}
    (line,) = found["noise_scale"].values()
    assert [step for step, _ in line] == [2, 3]
    assert [scale for _, scale in line] == pytest.approx([20 / 2, 30 / 8])
