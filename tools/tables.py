"""Tables of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def folded(summary: str, body: str) -> str:
    """What is there for who wants to see it all."""
    return f'<details markdown="1"><summary>{summary}</summary>\n\n{body}\n\n</details>'


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits; a dash for what could not be measured."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{places}f}"
    return f"{value:.{digits - 1}e}"


def share(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def middle(values: Sequence[float]) -> float:
    """The median of those that are numbers; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan
