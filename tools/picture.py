"""How the tools' pictures look, as SVG: readable on white, and for the colour-blind."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette (jfly.uni-koeln.de/color), its yellow left out: it is too light for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8")
LINES = ("-", "--", ":", "-.")  # once the colours are used up
GRAY = "#777777"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 200,  # of what is drawn as an image: clouds of points
    "svg.hashsalt": "equipoise",  # the same figure is the same file
}


def color(number: int) -> str:
    """The colour of a run, an arm or whatever else is compared; from the first again once they are used up."""
    return COLORS[number % len(COLORS)]


def styled(**more: Any) -> Any:
    """The context in which a picture is drawn; ``more`` are matplotlib's own settings."""
    settings: Any = {**_STYLE, **more}
    return plt.rc_context(settings)


def panels(count: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, list[Any]]:
    """A figure of ``count`` axes in rows of ``columns``, each ``size`` inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(max(4.5, size[0] * columns), size[1] * rows + 0.3),
        squeeze=False,
        layout="constrained",
        **options,
    )
    axes = list(grid.flat)
    for place, ax in enumerate(axes[count:], start=count):
        ax.remove()
        axes[place - columns].tick_params(labelbottom=True)  # it is the last of its column now
    return figure, axes[:count]


def svg(figure: Any) -> str:
    """Without a prologue and without metadata, so that it can stand in HTML as it is."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plt.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]
