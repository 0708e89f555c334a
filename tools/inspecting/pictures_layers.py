"""Pictures of activations and attention through the depth, and of what was logged over time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tools.inspecting.activations import PLACES, Entropies, Layer
from tools.inspecting.history import History
from tools.inspecting.style import blocks_axis, dodge, name_runs, plain_log
from tools.picture import GRAY, color, panels, styled, svg

_MEASURES = {
    "over": "features above 6",
    "kurtosis": "kurtosis",
    "ratio": "largest / median magnitude",
}

_TITLES = {
    "saturated": "saturated share",
    "outliers_over_6": "features above 6",
    "outliers_kurtosis": "kurtosis of activations",
    "outliers_max_median": "activations, largest / median",
    "attention_entropy": "attention entropy (nats)",
    "grad_kurtosis": "kurtosis of the gradient",
    "grad_hill": "Hill index of |gradient|",
    "grad_q999_q50": "q99.9 / q50 of |gradient|",
    "update_ratio": "norm of the update / of the weight",
    "noise_scale": "noise scale (tokens)",
}


def outliers(runs: Sequence[tuple[str, list[Layer]]]) -> str:
    """A row for each place, a column for each measure."""
    places = [place for place in PLACES if any(layer.place == place for _, layers in runs for layer in layers)]
    with styled():
        figure, axes = panels(3 * len(places), 3, (2.9, 1.8))
        for row, place in enumerate(places):
            for column, (measure, title) in enumerate(_MEASURES.items()):
                ax = axes[3 * row + column]
                for run, (_, layers) in enumerate(runs):
                    line = [(layer.depth, getattr(layer, measure)) for layer in layers if layer.place == place]
                    ax.plot(*zip(*line, strict=True), "o-", color=color(run), markersize=3.5, linewidth=1.2)
                if measure == "over":
                    top = max(10.0, *(layer.over for _, layers in runs for layer in layers if layer.place == place))
                    ax.set_ylim(-0.05 * top, 1.05 * top)
                else:
                    ax.set_yscale("log")
                    plain_log(ax.yaxis)
                if measure == "kurtosis":
                    ax.axhline(3, linestyle="--", color=GRAY, linewidth=1)
                blocks_axis(ax, "blocks behind it" if place == "stream" else "block")
                if row == 0:
                    ax.set_title(title)
                if column == 0:
                    ax.set_ylabel(PLACES[place])
        name_runs(figure, [label for label, _ in runs], [("a Gaussian", {"linestyle": "--"})])
        return svg(figure)


def entropies(runs: Sequence[tuple[str, Entropies]]) -> str:
    """Each head a dot, the mean over a block's heads a line."""
    with styled():
        figure, (ax,) = panels(1, 1, (7.0, 3.2))
        for run, (_, found) in enumerate(runs):
            shift = 0.6 * dodge(run, len(runs))
            for block, heads in enumerate(found.share.tolist()):
                ax.plot([block + shift] * len(heads), heads, "o", color=color(run), markersize=4, alpha=0.6)
            means = found.share.nanmean(1).tolist()
            ax.plot([block + shift for block in range(len(means))], means, color=color(run), linewidth=1.4)
        ax.set_ylim(0, 1.02)
        ax.set_ylabel("entropy / log(visible keys)")
        blocks_axis(ax)
        more = [("a head", {"marker": "o", "linestyle": "none"}), ("mean of the heads", {})]
        name_runs(figure, [label for label, _ in runs], more)
        return svg(figure)


def over_time(runs: Sequence[tuple[str, History]], metrics: Sequence[str]) -> str:
    """A panel a metric: each name a thin line, their median a thick one."""
    with styled():
        figure, axes = panels(len(metrics), 3, (3.1, 2.4))
        for ax, metric in zip(axes, metrics, strict=True):
            values: list[float] = []
            for run, (_, history) in enumerate(runs):
                series = history.get(metric, {})
                for line in series.values():
                    ax.plot(*zip(*line, strict=True), color=color(run), linewidth=0.6, alpha=0.3)
                by_step: dict[int, list[float]] = {}
                for line in series.values():
                    for step, value in line:
                        by_step.setdefault(step, []).append(value)
                values += [value for of in by_step.values() for value in of]
                if by_step:
                    mark = "o" if len(by_step) == 1 else ""
                    middles = [median(of) for of in by_step.values()]
                    ax.plot(list(by_step), middles, color=color(run), linewidth=1.8, marker=mark)
            positive = [value for value in values if value > 0]
            if len(positive) == len(values) and max(values) > 20 * min(values):
                ax.set_yscale("log")
                plain_log(ax.yaxis)
            ax.set_title(_TITLES.get(metric, metric))
            ax.set_xlabel("step")
        more = [("one module or weight", {"linewidth": 0.6}), ("median", {"linewidth": 1.8})]
        name_runs(figure, [label for label, _ in runs], more)
        return svg(figure)
