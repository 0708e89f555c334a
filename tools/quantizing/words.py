"""How treatments and changes of loss are written, in tables and pictures alike."""

from __future__ import annotations

from math import expm1

from tools.quantizing.formats import FORMATS, Treatment
from tools.studies.statistics import Interval

_FORMATS = {"fp8": "fp8 (e4m3)", "fp8-e5m2": "fp8 (e5m2)"}


def format_words(treatment: Treatment) -> str:
    return _FORMATS.get(treatment.format, treatment.format)


def treatment_words(treatment: Treatment) -> str:
    """ "int8, weights and activations, per row"."""
    parts = [
        format_words(treatment),
        "weights and activations" if treatment.activations else "weights",
    ]
    if FORMATS[treatment.format].largest is not None:
        parts.append("per row" if treatment.per_row else "per tensor")
    return ", ".join(parts)


def includes_zero(found: Interval) -> bool:
    """Whether the difference is not told from none."""
    assert found.low is not None
    assert found.high is not None
    return found.low <= 0 <= found.high


def change_words(found: Interval) -> str:
    """Nats, the half-width of the interval, and what the mean makes of perplexity."""
    return f"{difference_words(found)} ({_signed(100 * expm1(found.mean), 2)} %)"


def difference_words(found: Interval) -> str:
    """Nats and the half-width of the interval, with "n.s." where that includes zero."""
    assert found.high is not None
    noise = " n.s." if includes_zero(found) else ""
    return f"{_signed(found.mean, 5)} ± {found.high - found.mean:.5f}{noise}"


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0: no minus before a zero
