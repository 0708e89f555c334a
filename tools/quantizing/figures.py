"""The pictures of the report. Runs differ by colour and mark."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from tools.picture import MARKS, color, styled, svg
from tools.quantizing.formats import Treatment
from tools.quantizing.measuring import ALL, Measured
from tools.quantizing.words import format_words, includes_zero, treatment_words
from tools.studies.statistics import Interval

_DECADES = 3  # of the heatmap's colours, down from the largest change


def _look(number: int) -> dict[str, Any]:
    """A run's colour and mark."""
    return {"color": color(number), "marker": MARKS[number % len(MARKS)]}


def changes(measured: Sequence[Measured]) -> str:
    """A row for each treatment: the change of loss of every run and its interval, filled where that leaves out zero."""
    rows = list(measured[0].treated)
    found = [[run.change(run.treated[row]) for row in rows] for run in measured]
    with styled():
        height = 0.9 + len(rows) * max(0.3, 0.15 * len(measured))
        figure, ax = plt.subplots(figsize=(8, height), layout="constrained")
        ax.axvline(0, color="black", linewidth=0.8)
        for number, (run, line) in enumerate(zip(measured, found, strict=True)):
            look = _look(number)
            ax.plot([], [], label=run.name, linestyle="", markersize=5, **look)
            for row, one in enumerate(line):
                at = row + 0.7 * ((number + 0.5) / len(measured) - 0.5)
                assert one.low is not None
                assert one.high is not None
                ax.plot([one.low, one.high], [at, at], color=look["color"], linewidth=1.5)
                fill = "white" if includes_zero(one) else look["color"]
                ax.plot([one.mean], [at], markersize=4.5, markerfacecolor=fill, **look)
        ax.set_xscale("symlog", linthresh=_linear_part([one for line in found for one in line]))
        ax.set_yticks(range(len(rows)), [treatment_words(row) for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlabel("change of validation loss (nats per token; linear about zero)")
        figure.legend(loc="outside lower center", ncols=min(5, len(measured)))
        return svg(figure)


def _linear_part(found: Sequence[Interval]) -> float:
    """A power of ten no less than the middle half-width, so that noise about zero looks as wide as it is."""
    widths = sorted(one.high - one.mean for one in found if one.high is not None)
    middle = widths[len(widths) // 2]
    return float(10.0 ** ceil(log10(middle))) if middle > 0 else 1e-6


def layers(measured: Sequence[Measured], treatment: Treatment) -> str:
    """A panel for each run: what one linear alone costs, by block and kind, and at the edges all of each."""
    found = [{part: run.change(losses) for part, losses in run.layers.items()} for run in measured]
    most = max((one.mean for of in found for one in of.values()), default=0.0)
    most = most if most > 0 else 1e-6
    norm = LogNorm(most / 10**_DECADES, most, clip=True)
    colors = plt.get_cmap("Blues")
    depth = max(len(_axis(of, 0)) for of in found)
    columns = min(3, len(measured))
    rows = -(-len(measured) // columns)
    with styled(**{"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        size = (1.2 + 3.4 * columns, 0.6 + rows * (0.8 + 0.27 * depth))
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        image: Any = None
        for run, of, ax in zip(measured, found, list(grid.flat)[: len(measured)], strict=True):
            down, across = _axis(of, 0), _axis(of, 1)
            values = np.array([[max(of[b, k].mean, most / 10**_DECADES) for k in across] for b in down])
            image = ax.imshow(values, norm=norm, cmap=colors, aspect="auto")
            for i, block in enumerate(down):
                for j, kind in enumerate(across):
                    one = of[block, kind]
                    number = _thousandths(one.mean)
                    dark = float(norm(values[i, j])) > 0.6
                    text = f"({number})" if includes_zero(one) else number
                    ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
            ax.axhline(len(down) - 1.5, color="white", linewidth=3)
            ax.axvline(len(across) - 1.5, color="white", linewidth=3)
            ax.set_xticks(range(len(across)), across)
            ax.set_yticks(range(len(down)), [str(block) for block in down])
            ax.tick_params(length=0)
            ax.set_title(run.name)
            ax.set_ylabel("block")
        for ax in list(grid.flat)[len(measured) :]:
            ax.remove()
        bar = figure.colorbar(image, ax=list(grid.flat)[: len(measured)], shrink=0.8, pad=0.02)
        bar.set_label("change of loss (nats per token)")
        bar.outline.set_visible(False)
        figure.suptitle(f"{treatment_words(treatment)}: change of loss in 10⁻³ nats per token", fontsize=9)
        return svg(figure)


def _axis(of: Any, which: int) -> list[Any]:
    """Blocks or kinds in the model's order, ALL last."""
    seen = list(dict.fromkeys(part[which] for part in of))
    return [one for one in seen if one != ALL] + [ALL]


def _thousandths(nats: float) -> str:
    """Two digits that count, no finer than a hundredth."""
    value = 1000 * nats
    digits = 2 if value == 0 else min(2, max(0, 1 - floor(log10(abs(value)))))
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


def signals(measured: Sequence[Measured], treatment: Treatment) -> str:
    """By block, for every input of linears: what is left of it after rounding (above), and its outliers (below)."""
    kinds = list(dict.fromkeys(one.kinds for run in measured for one in run.inputs))
    with styled():
        figure, grid = plt.subplots(
            2, len(kinds), figsize=(1 + 2.2 * len(kinds), 4.8), sharex=True, sharey="row", squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for kind, (above, below) in zip(kinds, grid.T, strict=True):
            for number, run in enumerate(measured):
                of = [one for one in run.inputs if one.kinds == kind]
                blocks = [one.block for one in of]
                style = {"markersize": 4, "linewidth": 1.2, **_look(number)}
                above.plot(blocks, [one.ratio.per_tensor for one in of], **style)
                above.plot(blocks, [one.ratio.per_row for one in of], linestyle=":", markerfacecolor="white", **style)
                below.plot(blocks, [one.largest for one in of], label=run.name, **style)
            above.set_title(f"input of {kind}")
            below.set_yscale("log")
            below.set_xlabel("block")
            below.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[0, 0].set_ylabel(f"signal to noise\nof {format_words(treatment)} (dB)")
        grid[1, 0].set_ylabel("largest over median\nmagnitude")
        grid[0, 0].plot([], [], color="gray", label="per tensor")
        grid[0, 0].plot([], [], ":", color="gray", label="per row (token)")
        handles = [*grid[1, 0].get_legend_handles_labels()[0], *grid[0, 0].get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
        return svg(figure)
