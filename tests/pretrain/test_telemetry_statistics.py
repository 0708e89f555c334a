"""Shapes of distributions: against scipy, against laws whose figures are known, and free of scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.telemetry import statistics
from pretrain.telemetry.statistics import kurtosis, moments, outliers, sample, stride, tail


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=50))
def test_kurtosis_is_scipy_s(values: list[float]) -> None:
    from scipy.stats import kurtosis as reference

    x = np.array(values)
    if np.ptp(x) <= 1e-2 * np.abs(x).max():  # nothing varies, or both lose digits to the mean
        return
    expected = reference(x, fisher=False)
    # fp64, and a mean of at most 100 deviations costs the fourth moment up to 8 of 16 digits
    assert kurtosis(moments(torch.tensor(x))).item() == pytest.approx(expected, rel=1e-6)


def test_moments_of_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(7, 13)
    whole = moments(x)
    torch.testing.assert_close(moments(x[:3]) + moments(x[3:]) + moments(x[:0]), whole, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(statistics, "_CHUNK", 10)
    torch.testing.assert_close(moments(x), whole, rtol=1e-12, atol=1e-12)
    assert whole[0] == 91


def test_what_does_not_vary_has_no_kurtosis() -> None:
    for x in (torch.zeros(9), torch.full((9,), 0.1), torch.zeros(0), torch.tensor([1.0, torch.nan]), normal(99) + 1e4):
        assert kurtosis(moments(x)).isnan()


def test_a_mean_of_many_deviations_does_not_matter() -> None:
    x = normal(1000).double()
    assert kurtosis(moments(x + 500)).item() == pytest.approx(kurtosis(moments(x)).item(), rel=1e-3)


@pytest.mark.parametrize("index", [0.5, 2.0, 4.0])
def test_hill_finds_the_index_of_a_power_law(index: float) -> None:
    """Of the quantiles (i/n)^(-1/a), with k of them above the threshold, it is a / mean log((k + 1) / i) exactly."""
    count = 5000
    places = torch.arange(1, count + 1, dtype=torch.float64)
    quantiles = (places / count) ** (-1 / index)
    shuffled = quantiles[torch.randperm(count, generator=torch.Generator().manual_seed(0))].float()
    k = count // 100
    expected = index / ((k + 1) / places[:k]).log().mean().item()
    assert tail(shuffled).hill.item() == pytest.approx(expected, rel=1e-4)  # fp32 logarithms of ratios near 1
    assert expected == pytest.approx(index, rel=0.1)


def test_the_ratio_of_a_gaussian() -> None:
    from scipy.stats import norm

    ratio = tail(sample(normal(256, 256))).ratio.item()
    # 66 values beyond the quantile: its standard error is about 0.9 %
    assert ratio == pytest.approx(norm.ppf(0.9995) / norm.ppf(0.75), rel=0.03)


@given(st.integers(-60, 60), st.integers(0, 99))
def test_figures_are_free_of_scale(power: int, seed: int) -> None:
    """Powers of two scale exactly, but for logarithms of ratios, which are the same ones."""
    x = normal(40, 10, seed=seed)
    scaled = x * 2.0**power
    assert torch.equal(kurtosis(moments(x)), kurtosis(moments(scaled)))
    assert tail(sample(x)) == tail(sample(scaled))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(8, 200))
def test_a_sample_is_small_and_even(rows: int, columns: int, size: int) -> None:
    places = torch.arange(1, rows * columns + 1, dtype=torch.float32).reshape(rows, columns)
    found = sample(places, size)
    assert 0 < len(found) <= size
    assert (found.diff() == stride(places.shape, size)).all()
    if len(found) >= columns:
        assert len(set(((found - 1) % columns).tolist())) == columns, "every column is seen"


def test_a_sample_of_powers_of_two_sees_every_column() -> None:
    columns = (torch.arange(2**12) % 64).reshape(64, 64).float()
    assert len(sample(columns, 128).unique()) == 64


def test_tails_with_nothing_to_say() -> None:
    zeros = torch.zeros(1000)
    sparse = zeros.clone()
    sparse[:4] = 1.0
    for x in (torch.zeros(0), torch.ones(1), zeros, sparse, torch.full((1000,), torch.nan)):
        assert all(figure.isnan() for figure in tail(x))


def test_outliers_by_hand() -> None:
    x = torch.ones(2, 3, 4)
    x[0, 1, 2], x[1, 1, 2], x[1, 0, 0], x[1, 0, 1] = -8.0, 7.0, 6.5, 5.0
    found = outliers(x)
    assert found.over == 2  # features 2 and 0
    assert found.ratio == 8.0
    flat = x.double().flatten()
    centered = flat - flat.mean()
    expected = (centered**4).mean() / (centered**2).mean() ** 2
    assert found.kurtosis.item() == pytest.approx(expected.item(), rel=1e-6)
    assert math.isnan(outliers(torch.full((2, 3), torch.nan)).ratio)
