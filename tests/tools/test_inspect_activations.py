"""Sites, outliers and attention of tools.inspect, each against what numpy or scipy make of the same activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from models.elementwise import Elementwise
from models.rotary import rotary_table, rotate
from tests.tools.inspecting import QUIET, make_subject
from tools.inspecting import subject as subject_module
from tools.inspecting.activations import look_at_attention, look_at_outliers
from tools.inspecting.sites import bent, fit_dyt, look_at_sites
from tools.inspecting.subject import Subject


def activations(subject: Subject, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What module ``name`` reads and gives on the held-out text, in one pass."""
    seen: list[Any] = []
    module = subject.model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        subject.model(*subject.held_out)
    handle.remove()
    return seen[0]


@given(
    product=st.floats(0.05, 20), std=st.floats(1e-3, 1e3), scale=st.floats(0.1, 10), sign=st.sampled_from([1.0, -1.0])
)
def test_the_fit_finds_the_dyt_that_made_the_data(product: float, std: float, scale: float, sign: float) -> None:
    """Without noise, whatever the units of input and output."""
    x = std * torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha = product / x.std(correction=0).item()
    fit = fit_dyt(x, sign * scale * torch.tanh(alpha * x))
    # Brent's method ends at 1e-7 of log alpha; the flatter the optimum, the less that says.
    assert fit.alpha == pytest.approx(alpha, rel=1e-4)
    assert fit.scale == pytest.approx(sign * scale, rel=1e-4)
    assert fit.r2 == pytest.approx(1, abs=1e-8)
    assert fit.line_r2 < fit.r2


def test_the_fit_is_least_squares() -> None:
    """On data that no DyT made, scipy's own fit is no better; a line has no alpha, and what is constant no fit."""
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    y = F.softsign(3 * x) + 0.1 * torch.randn(3000, generator=torch.Generator().manual_seed(1))
    fit = fit_dyt(x, y)

    def dyt(x: np.ndarray, alpha: float, scale: float) -> np.ndarray:
        return scale * np.tanh(alpha * x)

    best, _ = scipy.optimize.curve_fit(dyt, x.double().numpy(), y.double().numpy(), p0=(1.0, 1.0))
    assert (fit.alpha, fit.scale) == pytest.approx(tuple(best), rel=1e-4)
    residual = y.double().numpy() - dyt(x.double().numpy(), *best)
    assert fit.r2 == pytest.approx(1 - residual.var() / y.double().numpy().var(), abs=1e-4)
    line = fit_dyt(x, 2 * x)
    assert math.isnan(line.alpha)
    assert line.r2 == line.line_r2 == pytest.approx(1)
    assert all(map(math.isnan, fit_dyt(torch.zeros(5), torch.ones(5))))


@pytest.mark.parametrize("at_once", [8192, 1])
def test_a_norm_is_seen_as_it_is(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its deviation, and points that are its input's elements and x / rms(x), without gain and bias; also when the
    text goes through in parts."""
    monkeypatch.setattr(subject_module, "_AT_ONCE", at_once)
    subject = make_subject(plan="gpt", trunk="gpt", bias=True)
    looks = {look.name: look for look in look_at_sites(subject, QUIET)}
    assert list(looks) == [f"blocks.{i}.{site}" for i in (0, 1) for site in ("attn_in", "mlp_in")] + ["final"]
    for name, look in looks.items():
        x, _ = activations(subject, name)
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        assert (look.function, look.alpha, look.saturated) == ("layernorm", None, None)
        assert look.std == pytest.approx(x.std(correction=0).item(), rel=1e-5)
        expected: dict[float, list[float]] = {}  # two tokens may share an element, and not what is made of it
        for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
            expected.setdefault(a, []).append(b)
        for points in ((look.x, look.y), (look.extreme_x, look.extreme_y)):
            for a, b in zip(points[0].tolist(), points[1].tolist(), strict=True):
                assert min(abs(b - other) for other in expected[a]) < 1e-5
        largest = x.abs().flatten().topk(len(look.extreme_x)).values
        assert look.extreme_x.abs().sort(descending=True).values.tolist() == pytest.approx(largest.tolist())
        assert bent(look) == look.fit.alpha or math.isnan(bent(look))


@pytest.mark.parametrize("at_once", [8192, 1])
def test_a_dyt_is_seen_as_it_is(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alpha, the saturated share, and the curve tanh(alpha x); with parts of unequal size the share is that of all."""
    monkeypatch.setattr(subject_module, "_AT_ONCE", at_once)
    subject = make_subject(sequences=5, plan="dyt", sites={"mlp_mid": {"function": "derf", "alpha": 0.7}})
    found = look_at_sites(subject, QUIET)
    assert {look.function for look in found} == {"dyt", "derf"}
    for look in found:
        module = subject.model.get_submodule(look.name)
        assert isinstance(module, Elementwise)
        x, _ = activations(subject, look.name)
        shift = 0.0 if module.shift is None else module.shift.item()
        alpha = module.alpha if isinstance(module.alpha, float) else module.alpha.item()
        f = torch.tanh if look.function == "dyt" else torch.erf
        y = f(alpha * x + shift)
        assert bent(look) == look.alpha == pytest.approx(alpha)
        assert look.saturated == pytest.approx((y.abs() > 0.95).float().mean().item(), abs=1e-6)
        assert look.fit is None
        torch.testing.assert_close(look.y, f(alpha * look.x + shift), atol=1e-4, rtol=1e-4)
        assert look.curve is not None
        torch.testing.assert_close(look.curve[1], f(alpha * look.curve[0] + shift))


def test_outliers_are_counted_where_they_are() -> None:
    """Against scipy, and two features of the embedding made large are found in the stream and not behind the norm."""
    subject = make_subject(plan="llama")
    with torch.no_grad():
        subject.model.embedding.weight[:, [3, 17]] = 50.0
    tokens, layers = look_at_outliers(subject, QUIET)
    assert tokens == subject.held_out.inputs.numel()
    found = {(layer.place, layer.depth): layer for layer in layers}
    assert set(found) == {("stream", d) for d in range(3)} | {
        (p, b) for p in ("q", "out", "up", "down") for b in (0, 1)
    }
    names = {
        ("stream", 0): "blocks.0.attn_in",
        ("q", 0): "blocks.0.attention.q",
        ("down", 1): "blocks.1.feedforward.down",
    }
    for place, name in names.items():
        x = activations(subject, name)[0].flatten(0, 1).double().numpy()
        layer = found[place]
        assert layer.features == x.shape[1]
        assert layer.over == (np.abs(x).max(0) > 6).sum()
        assert layer.kurtosis == pytest.approx(scipy.stats.kurtosis(x, axis=None, fisher=False), rel=1e-5)
        assert layer.ratio == pytest.approx(
            np.abs(x).max() / np.median(np.abs(x)), rel=0.01
        )  # middle one of an even count
    assert found["stream", 0].over == 2
    end = activations(subject, "blocks.1")[1]
    assert found["stream", 2].kurtosis == pytest.approx(scipy.stats.kurtosis(end, axis=None, fisher=False), rel=1e-4)


@pytest.mark.parametrize("at_once", [8192, 1])
@pytest.mark.parametrize("documents", [False, True])
def test_entropy_is_that_of_the_explicit_softmax(
    documents: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped keys, query and key norms, RoPE, and documents, a query at a time."""
    monkeypatch.setattr(subject_module, "_AT_ONCE", at_once)
    subject = make_subject(plan="dnt", kv_heads=2, documents=documents)
    found = look_at_attention(subject, QUIET)
    assert found.share.shape == (2, 4)
    inputs = subject.held_out.inputs
    table = rotary_table(inputs.shape[1], 8, 10000.0, inputs.device)
    for block in range(2):
        q = rotate(activations(subject, f"blocks.{block}.attention.query")[1].transpose(1, 2), table)
        k = rotate(activations(subject, f"blocks.{block}.attention.key")[1].transpose(1, 2), table)
        for head in range(4):
            shares, nats = [], []
            for row in range(len(inputs)):
                for place in range(inputs.shape[1]):
                    begin = 0
                    if documents:
                        ends = (inputs[row, :place] == 0).nonzero().flatten().tolist()
                        begin = ends[-1] + 1 if ends else 0
                    scores = (
                        (k[row, head // 2, begin : place + 1] @ q[row, head, place] / math.sqrt(8)).double().numpy()
                    )
                    p = np.exp(scores - scores.max())
                    p /= p.sum()
                    nats.append(-(p * np.log(p)).sum())
                    if len(p) > 1:
                        shares.append(nats[-1] / math.log(len(p)))
            assert found.share[block, head].item() == pytest.approx(np.mean(shares), abs=1e-5)
            assert found.nats[block, head].item() == pytest.approx(np.mean(nats), abs=1e-5)
