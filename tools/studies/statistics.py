"""Intervals and tests over seeds. Differences are between losses of the same seed: the same data in the same order.

All assume that losses of different seeds are normally distributed, as Student's t does; a few seeds cannot show whether
they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over ``n`` seeds, and where the mean over all seeds is with CONFIDENCE; None and None for one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


class PairedTest(NamedTuple):
    """A mean difference, and the probability of one at least as large, either way, if there were none in truth."""

    difference: Interval
    p: float


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval: mean ± t · s / √n with n - 1 degrees of freedom."""
    from scipy.stats import t

    n, mean = len(values), fmean(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """The paired t test of ``first`` minus ``second``, which are in the order of the same seeds, two or more."""
    from scipy.stats import ttest_rel

    differences = [a - b for a, b in zip(first, second, strict=True)]
    found = interval(differences)
    if stdev(differences) == 0:  # the statistic is 0/0 or infinite
        return PairedTest(found, 1.0 if found.mean == 0 else 0.0)
    return PairedTest(found, float(ttest_rel(first, second).pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order of ``values``: rejecting those below q makes one false rejection or more with a
    probability of q at most (Holm 1979, Scandinavian Journal of Statistics 6, 65-70)."""
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted
