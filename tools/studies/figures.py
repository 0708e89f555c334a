"""The pictures of a report.

Arms differ by colour; where a study has several factors, the one with the fewest choices has a panel for each instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from statistics import fmean, median
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, NullFormatter

from pretrain.run import RunFolder
from tools.picture import COLORS, LINES, color, styled, svg
from tools.studies.choosing import scores
from tools.studies.grid import Arm, Study, Tuned, named
from tools.studies.outcomes import Result
from tools.studies.verdict import Verdict, tokens

_POINTS = 150  # of a curve; more logged steps are averaged
_BEGINNING = 0.1  # of a run: the loss falls so far in it that nothing else would be seen


class Look(NamedTuple):
    """How an arm is drawn."""

    panel: int
    label: str
    color: str
    line: str


def looks(study: Study) -> tuple[list[str], dict[Arm, Look]]:
    """The panels' titles, and every arm's look. Arms of one label look alike in all panels."""
    sizes = [len(choices) for choices in study.factors.values()]
    split = None if len(sizes) == 1 else max(i for i, size in enumerate(sizes) if size == min(sizes))
    panels = [""] if split is None else list([*study.factors.values()][split])
    labels: list[str] = []
    found = {}
    for arm in study.candidates:
        label = named(tuple(name for i, name in enumerate(arm) if i != split))
        if label not in labels:
            labels.append(label)
        number = labels.index(label)
        line = LINES[number // len(COLORS) % len(LINES)]
        found[arm] = Look(0 if split is None else panels.index(arm[split]), label, color(number), line)
    return panels, found


def loss_curves(verdict: Verdict) -> str:
    """Training loss of the final runs over tokens: the mean over seeds, and from the least to the greatest seed."""
    panels, arms = looks(verdict.study)
    with styled():
        figure, axes = _panels(panels)
        seen = []
        for arm, look in arms.items():
            curve = _curve([result for result in verdict.finals(arm) if result.state != "diverged"])
            if not curve:
                continue
            x, mean, low, high = zip(*curve, strict=True)
            axes[look.panel].plot(x, mean, look.line, color=look.color, linewidth=1.4, label=look.label)
            axes[look.panel].fill_between(x, low, high, color=look.color, alpha=0.2, linewidth=0)
            length = tokens(verdict.finals(arm)[0].cell)
            seen += [
                value for at, _, least, greatest in curve if at > _BEGINNING * length for value in (least, greatest)
            ]
        for ax in axes:
            if seen:
                margin = 0.04 * (max(seen) - min(seen))
                ax.set_ylim(min(seen) - margin, max(seen) + margin)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.set_xlabel("tokens")
        axes[0].set_ylabel("training loss (nats per token)")
        _legend(figure, axes)
        return svg(figure)


def sensitivity(verdict: Verdict, key: str) -> str:
    """Validation loss over the values of ``key`` that were tried: the mean over tuning seeds, each seed a dot.

    Of several candidates with the same value, the best. What did not finish lies on the upper edge.
    """
    panels, arms = looks(verdict.study)
    lines = {arm: list(_tried(verdict, arm, key)) for arm in arms}
    finite = [mean for line in lines.values() for _, mean, _ in line if isfinite(mean)]
    top = bottom = None
    if finite:  # one bad value would flatten all others
        best = [min(mean for _, mean, _ in line) for line in lines.values() if line]
        worst = max(value for value in best if isfinite(value))  # every arm's best is shown
        span = max(0.3, worst - min(finite), min(max(finite) - min(finite), 3 * (median(finite) - min(finite))))
        bottom, top = min(finite) - 0.06 * span, min(finite) + 1.06 * span
    with styled():
        figure, axes = _panels(panels)
        for arm, look in arms.items():
            ax, line = axes[look.panel], lines[arm]
            if len(line) < 2:
                continue
            known = [(x, y) for x, y, _ in line if isfinite(y)]
            ax.plot([x for x, _ in known], [y for _, y in known], look.line, color=look.color, linewidth=1.4)
            ax.plot([], [], look.line, color=look.color, marker="o", markersize=4, label=look.label)
            for x, _, results in line:
                for result in results:
                    _dot(ax, x, result, top, look.color)
            if arm in verdict.chosen:
                chosen = [(x, y) for x, y, _ in line if x == dict(verdict.chosen[arm])[key]]
                ring = {"markerfacecolor": "none", "markeredgecolor": look.color, "clip_on": False}
                ax.plot(*zip(*chosen, strict=True), "o", markersize=11, **ring)
        for ax in axes:
            if ax.has_data() and all(value > 0 for line in lines.values() for value, _, _ in line):
                ax.set_xscale("log")
                ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_ylim(bottom, top)
            ax.set_xlabel(key)
        axes[0].set_ylabel("validation loss (nats per token)")
        axes[0].plot([], [], "o", markersize=9, markerfacecolor="none", markeredgecolor="gray", label="chosen")
        axes[0].plot([], [], "x", color="gray", label="diverged or stopped early")
        axes[0].plot([], [], "^", color="gray", markersize=5, label="above the edge")
        _legend(figure, axes)
        return svg(figure)


def final_losses(verdict: Verdict) -> str:
    """A row for each arm: every final seed a dot, the mean and its interval a bar."""
    _, arms = looks(verdict.study)
    with styled():
        figure, ax = plt.subplots(figsize=(8, 0.9 + 0.34 * len(arms)), layout="constrained")
        for row, (arm, look) in enumerate(arms.items()):
            known = [result.loss for result in verdict.finals(arm) if result.loss is not None]
            if found := verdict.loss(arm):
                low, high = (found.mean if edge is None else edge for edge in (found.low, found.high))
                ax.plot([low, high], [row, row], color=look.color, linewidth=5, alpha=0.35, solid_capstyle="butt")
                ax.plot([found.mean], [row], "|", color=look.color, markersize=14, markeredgewidth=2)
            else:
                ax.annotate(verdict.why_no_loss(arm), (0.01, row), xycoords=("axes fraction", "data"), va="center")
            ax.plot(known, [row] * len(known), "o", color=look.color, markersize=4)
        ax.set_yticks(range(len(arms)), [named(arm) for arm in arms])
        ax.set_ylim(len(arms) - 0.4, -0.6)
        ax.set_xlabel("validation loss (nats per token)")
        return svg(figure)


def differences(verdict: Verdict) -> str:
    """A row for each comparison: the mean difference and its interval, filled where p after Holm is below 0.05."""
    rows = [(one, one.test.difference) for one in verdict.comparisons if one.test is not None]
    with styled():
        figure, ax = plt.subplots(figsize=(8, 0.9 + 0.3 * len(rows)), layout="constrained")
        ax.axvline(0, color="black", linewidth=0.8)
        for row, (one, found) in enumerate(rows):
            assert found.low is not None
            assert found.high is not None
            filled = one.adjusted is not None and one.adjusted < 0.05
            ax.plot([found.low, found.high], [row, row], color=COLORS[0], linewidth=1.5)
            ax.plot([found.mean], [row], "o", color=COLORS[0], markerfacecolor=COLORS[0] if filled else "white")
        ax.set_yticks(range(len(rows)), [one.name for one, _ in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlabel("difference of validation loss (nats per token); to the left the first is better")
        return svg(figure)


def _panels(titles: Sequence[str]) -> tuple[Any, list[Any]]:
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    size = (8 if columns > 1 else 6.5, 3.4 * rows if columns > 1 else 3.8)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for title, ax in zip(titles, axes, strict=False):
        ax.set_title(title)
    for ax in axes[len(titles) :]:
        ax.remove()
    return figure, axes[: len(titles)]


def _legend(figure: Any, axes: list[Any]) -> None:
    """One for all panels, each label once."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))


def _curve(results: Sequence[Result]) -> list[tuple[float, float, float, float]]:
    """(tokens, mean, least, greatest) at the steps that all of the runs have logged, at most _POINTS of them."""
    runs = [
        {record["tokens"]: record["loss"] for record in records if record.get("loss") is not None}
        for result in results
        if (records := RunFolder(result.cell.folder).records())
    ]
    if not runs:
        return []
    shared = sorted(set.intersection(*(set(run) for run in runs)))
    width = -(-len(shared) // _POINTS)
    curve = []
    for start in range(0, len(shared), max(1, width)):
        chunk = shared[start : start + width]
        values = [fmean(run[at] for at in chunk) for run in runs]
        curve.append((fmean(chunk), fmean(values), min(values), max(values)))
    return curve


def _tried(verdict: Verdict, arm: Arm, key: str) -> Iterator[tuple[float, float, list[Result]]]:
    """(value, score, results by seed) of the best candidate with each value of ``key``, from the least value on."""
    results = verdict.tried(arm)
    means = scores(results)
    best: dict[float, Tuned] = {}
    for (_, tuned), mean in means.items():
        value = dict(tuned).get(key)
        if value is not None and (value not in best or mean < means[arm, best[value]]):
            best[value] = tuned
    for value, tuned in sorted(best.items()):
        yield value, means[arm, tuned], [result for result in results if result.cell.tuned == tuned]


def _dot(ax: Any, x: float, result: Result, top: float | None, color: str) -> None:
    if result.loss is not None and (top is None or result.loss <= top):
        ax.plot([x], [result.loss], "o", color=color, markersize=4)
    elif result.is_over and top is not None:
        mark = "x" if result.loss is None else "^"
        ax.plot([x], [top], mark, color=color, markersize=6, clip_on=False, zorder=5)
