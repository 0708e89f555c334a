"""Intervals and tests against published figures, and against what they promise of repeated studies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.studies.statistics import holm, interval, paired

# Student's own example (1908): hours of sleep that two drugs added, in ten patients. The figures below are those of R's
# manual, t.test(extra ~ group, sleep, paired = TRUE).
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_student_s_example() -> None:
    found = paired(FIRST, SECOND)
    assert found.difference == pytest.approx((-1.58, -2.4598858, -0.7001142, 10), abs=1e-7)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert paired(SECOND, FIRST).p == found.p
    # By hand, with t(0.975, 2) = 4.302653 from a table: 3 seeds, s = 1.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5, 3), abs=1e-6)


def test_one_seed_has_no_interval() -> None:
    assert interval([2.0]) == (2.0, None, None, 1)


def test_differences_without_spread() -> None:
    """An arm against its twin, and losses that differ by exactly as much under each seed."""
    assert paired([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]) == ((0.0, 0.0, 0.0, 3), 1.0)
    assert paired([1.5, 2.5], [1.0, 2.0]) == ((0.5, 0.5, 0.5, 2), 0.0)


def test_intervals_hold_what_they_promise() -> None:
    """Of 1,000 studies with 3 seeds and no difference 95 % hold 0, and p is below 0.05 in the others, though seeds
    differ far more than arms do: within 2.8 %, four times the standard error of 0.69 %. The normal distribution's 1.96
    in place of t would hold it in 81 %, and a test that does not pair by seed nearly always."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1000, 2, 3)) + 10 * rng.normal(size=(1000, 1, 3))
    found = [paired(*study) for study in noise.tolist()]
    held = [(one.difference.low or 0) <= 0 <= (one.difference.high or 0) for one in found]
    assert np.mean(held) == pytest.approx(0.95, abs=0.028)
    assert [one.p < 0.05 for one in found] == [not inside for inside in held]


def test_holm_by_hand() -> None:
    """Holm's procedure in words: the least of m against q / m, the next against q / (m - 1), and stop at the first that
    fails."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_procedure_rejects(values: list[float], level: float) -> None:
    rejected = set()
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        if (len(values) - rank) * values[i] > level:
            break
        rejected.add(i)
    assert {i for i, adjusted in enumerate(holm(values)) if adjusted <= level} == rejected
