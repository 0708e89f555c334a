"""Pictures of the normalization sites: alpha beside 1/std, and each function on its inputs beside a DyT."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, isnan
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from tools.inspecting.history import History
from tools.inspecting.sites import SiteLook, bent
from tools.inspecting.style import blocks_axis, name_runs, plain_log
from tools.picture import GRAY, MARKS, color, panels, styled, svg

_POINTS = 1500  # of a cloud, beside the extreme ones
_ATTENTION = ("attn_in", "query", "attn_mid", "attn_out", "attn_post")
_MLP = ("mlp_in", "mlp_act", "mlp_mid", "mlp_out", "mlp_post")

Runs = Sequence[tuple[str, list[SiteLook]]]


def alphas(runs: Runs) -> str:
    """Alpha against 1/std of the input, and their quotient through the depth: filled where alpha is the model's own,
    hollow where it is that of the DyT nearest to a norm."""
    sites = list(dict.fromkeys(look.site for _, looks in runs for look in looks if isfinite(bent(look))))
    marks = dict(zip(sites, MARKS * 2, strict=False))
    with styled():
        figure, (left, right) = panels(2, 2, (4.6, 4.0))
        for run, (_, looks) in enumerate(runs):
            known = [look for look in looks if isfinite(bent(look)) and look.std > 0]
            for look in known:
                face = color(run) if look.alpha is not None else "white"
                how = {"color": color(run), "markerfacecolor": face, "markersize": 5, "linestyle": "none"}
                left.plot([1 / look.std], [bent(look)], marks[look.site], **how)
            for site in sites:
                line = [
                    (look.block, bent(look) * look.std)
                    for look in known
                    if look.site == site and look.block is not None
                ]
                if line:
                    own = any(look.alpha is not None for look in known if look.site == site)
                    face = color(run) if own else "white"
                    style = {"color": color(run), "markerfacecolor": face, "markersize": 5, "linewidth": 1}
                    right.plot(*zip(*line, strict=True), marker=marks[site], **style)
        low, high = min(left.get_xlim()[0], left.get_ylim()[0]), max(left.get_xlim()[1], left.get_ylim()[1])
        for ax in (left, right):
            ax.set_yscale("log")
        left.set_xscale("log")
        both = [v for _, looks in runs for k in looks if isfinite(bent(k)) and k.std > 0 for v in (1 / k.std, bent(k))]
        low, high = min(both) / 1.3, max(both) * 1.3
        left.plot([low, high], [low, high], "--", color=GRAY, linewidth=1)
        left.annotate(
            "alpha = 1/std",
            (high, high),
            ha="right",
            va="top",
            rotation=0,
            color=GRAY,
            xytext=(-10, -2),
            textcoords="offset points",
        )
        right.axhline(1, linestyle="--", color=GRAY, linewidth=1)
        left.set_xlabel("1 / standard deviation of the site's input")
        left.set_ylabel("alpha")
        right.set_ylabel("alpha × standard deviation of the input")
        blocks_axis(right)
        more = [(site, {"marker": marks[site], "linestyle": "none"}) for site in sites]
        name_runs(figure, [label for label, _ in runs], more)
        return svg(figure)


def alphas_over_time(history: History) -> str:
    """One run's: alpha as a line and 1/std of the input as dashes, a panel a site, the colour says the block."""
    names = list(history["alpha"])
    sites = list(dict.fromkeys(name.split(".")[-1] for name in names))
    depth = 1 + max((_block(name) or 0 for name in names), default=0)
    shades = plt.get_cmap("viridis")
    with styled():
        figure, axes = panels(len(sites), 3, (3.4, 3.0), sharex=True)
        for ax, site in zip(axes, sites, strict=True):
            for name in (name for name in names if name.split(".")[-1] == site):
                block = _block(name)
                shade = "black" if block is None else shades(0.9 * block / max(1, depth - 1))
                line, inverse = history["alpha"][name], history.get("inverse_std", {}).get(name)
                mark = "o" if len(line) < 3 else ""
                ax.plot(*zip(*line, strict=True), color=shade, linewidth=1.4, marker=mark)
                if inverse:
                    ax.plot(*zip(*inverse, strict=True), "--", color=shade, linewidth=1, marker=mark and "x")
            ax.set_yscale("log")
            plain_log(ax.yaxis)
            ax.set_title(site)
            ax.set_xlabel("step")
        handles = [Line2D([], [], color=GRAY), Line2D([], [], color=GRAY, linestyle="--")]
        handles += [
            Line2D([], [], color=shades(0.0), linewidth=3),
            Line2D([], [], color=shades(0.9), linewidth=3),
        ]
        labels = ["alpha", "1/std of the input", "first block", "last block"]
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        return svg(figure)


def curves(runs: Runs) -> str:
    """Two rows a run: an attention site and a feed-forward site of the first, middle and last block, and what stands
    outside the blocks."""
    grid = [row for run, (label, looks) in enumerate(runs) for row in _rows(run, label, looks)]
    with styled():
        figure, axes = panels(4 * len(grid), 4, (2.5, 2.3))
        for place, (run, label, look) in enumerate(one for row in grid for one in row):
            ax = axes[place]
            if look is None:
                ax.remove()
                continue
            _curve(ax, look, color(run))
            ax.set_title(f"{label}\n{look.name}", fontsize=8)
        more: list[tuple[str, dict[str, Any]]] = [
            ("DyT nearest to a norm", {"color": "black"}),
            ("the function itself", {"color": "black", "linestyle": "--"}),
            ("how often an input occurs", {"color": GRAY, "linewidth": 6, "alpha": 0.3}),
        ]
        name_runs(figure, [label for label, _ in runs], more)
        figure.supxlabel("input of the site", fontsize=9)
        figure.supylabel("output, without gain and shift", fontsize=9)
        return svg(figure)


def _rows(run: int, label: str, looks: list[SiteLook]) -> list[list[tuple[int, str, SiteLook | None]]]:
    blocks = sorted({look.block for look in looks if look.block is not None})
    chosen = [blocks[0], blocks[len(blocks) // 2], blocks[-1]] if blocks else []
    outside: list[SiteLook | None] = [look for look in looks if look.block is None]
    rows = []
    for place, names in enumerate((_ATTENTION, _MLP)):
        row: list[SiteLook | None] = []
        for block in dict.fromkeys(chosen):
            here = {look.site: look for look in looks if look.block == block}
            row.append(next((here[name] for name in names if name in here), None))
        row += [None] * (3 - len(row))
        row.append(outside[-1 - place] if len(outside) > place else None)
        if any(row):
            rows.append([(run, label, look) for look in row])
    return rows


def _curve(ax: Any, look: SiteLook, shade: str) -> None:
    if look.alpha is None:
        x = np.concatenate([look.x[:_POINTS].numpy(), look.extreme_x.numpy()])
        y = np.concatenate([look.y[:_POINTS].numpy(), look.extreme_y.numpy()])
        ax.plot(x, y, ".", color=shade, markersize=2, alpha=0.5, markeredgewidth=0, rasterized=True)
        fit = look.fit
        if fit is None or isnan(fit.line_r2):
            return
        if isnan(fit.alpha):
            _say(ax, f"a line, R² = {fit.line_r2:.3f}")
            return
        line = np.linspace(x.min(), x.max(), 300)
        ax.plot(line, fit.scale * np.tanh(fit.alpha * line), color="black", linewidth=1.3)
        _say(ax, f"α = {fit.alpha:.2g}, R² = {fit.r2:.3f}")
        return
    assert look.curve is not None
    counts, edges = np.histogram(look.x.numpy(), bins=40)
    ax.plot(*look.curve.numpy(), "--", color="black", linewidth=1.3)
    low, high = ax.get_ylim()
    high += 0.15 * (high - low)  # room for the words
    ax.bar(edges[:-1], counts / counts.max() * (high - low), np.diff(edges), low, align="edge", color=shade, alpha=0.3)
    ax.set_ylim(low, high)
    _say(ax, f"α = {look.alpha:.2g}" + ("" if look.saturated is None else f", {100 * look.saturated:.1f} % saturated"))


def _say(ax: Any, text: str) -> None:
    paper = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
    ax.annotate(text, (0.04, 0.97), xycoords="axes fraction", va="top", fontsize=7.5, bbox=paper)


def _block(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None
