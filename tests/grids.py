"""Grids of which the suite runs a part: the rest has the mark survey (``pytest -m survey``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def surveyed(cases: Iterable[Any], suite: Collection[Any]) -> list[Any]:
    """``cases`` for ``pytest.mark.parametrize``, all but those of ``suite`` marked survey."""
    cases = list(cases)
    assert set(suite) <= set(cases), "the suite would run what is none of the cases"
    return [case if case in suite else pytest.param(case, marks=pytest.mark.survey) for case in cases]
