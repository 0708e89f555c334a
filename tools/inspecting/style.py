"""What the pictures have in common: axes, legends. A run has one colour in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from tools.picture import GRAY, color


def blocks_axis(ax: Any, label: str = "block") -> None:
    """Whole numbers along the axis, which counts blocks."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.set_xlabel(label)


def dodge(run: int, runs: int) -> float:
    """Where among the places of one label a run's points stand, so that runs do not hide each other."""
    return 0.0 if runs == 1 else 0.5 * (run / (runs - 1) - 0.5)


def name_runs(figure: Any, labels: Sequence[str], more: Sequence[tuple[str, dict[str, Any]]] = ()) -> None:
    """A legend above the figure: the runs' colours, and whatever else needs a name."""
    handles = [Line2D([], [], color=color(run), linewidth=3) for run in range(len(labels))]
    handles += [Line2D([], [], **{"color": GRAY, **look}) for _, look in more]
    names = [*labels, *(name for name, _ in more)]
    # a letter is about 5.5 points wide at this size
    room = figure.get_figwidth() * 72 / (5.5 * max(map(len, names)) + 45)
    figure.legend(handles, names, loc="outside upper center", ncols=max(1, min(5, len(names), int(room))))


def plain_log(axis: Any) -> None:
    """Numbers as one writes them on an axis of few decades, some between the powers of ten where there is room."""
    low, high = sorted(axis.get_view_interval())
    decades = log(high / low, 10)
    if decades > 5:
        return
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if decades < 1.5:
        powers = range(floor(log(low, 10)), ceil(log(high, 10)) + 1)
        axis.set_ticks([m * 10.0**power for power in powers for m in (1, 2, 3, 5) if low <= m * 10.0**power <= high])
    axis.set_minor_formatter(NullFormatter())
