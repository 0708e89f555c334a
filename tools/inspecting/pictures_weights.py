"""Pictures of weights: their gradients' tails, their singular values, and what scaling them does."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np
from matplotlib.ticker import NullLocator

from tools.inspecting.gradients import LEVELS, Gradients
from tools.inspecting.invariance import FACTORS, INPUT, Invariances
from tools.inspecting.spectra import Spectra
from tools.inspecting.style import blocks_axis, dodge, name_runs, plain_log
from tools.inspecting.subject import KINDS
from tools.picture import GRAY, color, panels, styled, svg

_GAUSSIAN = {"kurtosis": 3.0, "hill": None, "ratio": 4.88, "noise_kurtosis": 3.0}
_MEASURES = {
    "kurtosis": "kurtosis of G (right: heavier)",
    "ratio": "q99.9 / q50 of |G| (right: heavier)",
    "hill": "Hill index of |G| (left: heavier)",
    "noise_kurtosis": "kurtosis of the noise (right: heavier)",
}


def tails(runs: Sequence[tuple[str, Gradients]]) -> str:
    """A row for each kind of weight, each weight a dot."""
    kinds = _kinds([one.kind for _, found in runs for one in found.weights])
    with styled():
        figure, axes = panels(4, 2, (4.3, 0.9 + 0.3 * len(kinds)), sharey=True)
        for ax, (measure, title) in zip(axes, _MEASURES.items(), strict=True):
            for run, (_, found) in enumerate(runs):
                for one in found.weights:
                    value = getattr(one, measure)
                    if isfinite(value):
                        row = kinds.index(one.kind) + dodge(run, len(runs))
                        ax.plot([value], [row], "o", color=color(run), markersize=4.5, alpha=0.65)
            if (expected := _GAUSSIAN[measure]) is not None:
                ax.axvline(expected, linestyle="--", color=GRAY, linewidth=1)
            ax.set_xscale("log")
            plain_log(ax.xaxis)
            ax.set_yticks(range(len(kinds)), kinds)
            ax.grid(visible=False, axis="y")
            for edge in range(1, len(kinds)):
                ax.axhline(edge - 0.5, color=GRAY, linewidth=0.4, alpha=0.5)
            ax.set_ylim(len(kinds) - 0.5, -0.5)
            ax.set_xlabel(title)
        name_runs(figure, [label for label, _ in runs], [("a Gaussian", {"linestyle": "--"})])
        return svg(figure)


def survival(runs: Sequence[tuple[str, Gradients]]) -> str:
    """A panel a kind, a line a weight: the share of elements above so many times the weight's RMS."""
    kinds = _kinds([one.kind for _, found in runs for one in found.weights])
    normal = _normal_quantiles()
    with styled():
        figure, axes = panels(len(kinds), 3, (2.9, 2.2), sharex=True, sharey=True)
        for ax, kind in zip(axes, kinds, strict=True):
            for run, (_, found) in enumerate(runs):
                for one in found.weights:
                    if one.kind == kind:
                        levels = LEVELS[: len(one.quantiles)]
                        ax.plot(one.quantiles, levels, color=color(run), linewidth=1.1, alpha=0.75)
            ax.plot(normal, LEVELS, "--", color=GRAY, linewidth=1)
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xlim(left=0.1)
            ax.set_title(kind)
        figure.supxlabel("|G| / RMS of the weight's G", fontsize=9)
        figure.supylabel("share of elements beyond", fontsize=9)
        name_runs(figure, [label for label, _ in runs], [("a Gaussian", {"linestyle": "--"})])
        return svg(figure)


def noise_norms(runs: Sequence[tuple[str, Gradients]]) -> str:
    """The share of sequences whose noise is larger, over the norm of the noise in units of its median."""
    with styled():
        figure, (ax,) = panels(1, 1, (6.5, 3.0))
        for run, (_, found) in enumerate(runs):
            norms = np.sort(found.norms)
            beyond = 1 - np.arange(len(norms)) / len(norms)
            ax.step(norms / np.median(norms), beyond, where="pre", color=color(run), linewidth=1.4)
            ax.plot(norms / np.median(norms), beyond, "o", color=color(run), markersize=3)
        ax.set_yscale("log")
        ax.set_xlabel("|g_i − G| / median over sequences")
        ax.set_ylabel("share of sequences at or beyond")
        name_runs(figure, [label for label, _ in runs])
        return svg(figure)


def spectra(runs: Sequence[tuple[str, Spectra]]) -> str:
    """A panel a kind, a line a weight: singular values in descending order."""
    kinds = _kinds([one.kind for _, found in runs for one in found.weights])
    with styled():
        figure, axes = panels(len(kinds), 3, (2.9, 2.2), sharex=True)
        for ax, kind in zip(axes, kinds, strict=True):
            for run, (_, found) in enumerate(runs):
                for one in found.weights:
                    if one.kind == kind:
                        count = len(one.values)
                        x = np.arange(count) / max(1, count - 1)
                        ax.plot(x, one.values.clamp(min=1e-12), color=color(run), linewidth=1, alpha=0.75)
            ax.set_yscale("log")
            plain_log(ax.yaxis)
            ax.set_title(kind)
        figure.supxlabel("place in the order, as a share of all", fontsize=9)
        figure.supylabel("singular value", fontsize=9)
        name_runs(figure, [label for label, _ in runs])
        return svg(figure)


def spectral_norms(runs: Sequence[tuple[str, Spectra]]) -> str:
    """Through the depth: the largest singular value of each kind of weight, and of W_q^T W_k each head's."""
    kinds = _kinds([one.kind for _, found in runs for one in found.weights if one.block is not None])
    with styled():
        figure, axes = panels(len(kinds) + 1, 4, (2.4, 2.2))
        for ax, kind in zip(axes, kinds, strict=False):
            for run, (_, found) in enumerate(runs):
                line = [(one.block, one.values[0].item()) for one in found.weights if one.kind == kind]
                if line:
                    ax.plot(*zip(*line, strict=True), "o-", color=color(run), markersize=3.5, linewidth=1.2)
            ax.set_title(kind)
        last = axes[len(kinds)]
        for run, (_, found) in enumerate(runs):
            shift = 0.6 * dodge(run, len(runs))
            for one in found.scores:
                heads = one.sigma[:, 0].tolist()
                last.plot([one.block + shift] * len(heads), heads, "o", color=color(run), markersize=3.5, alpha=0.6)
        last.set_title("W_qᵀ W_k, each head")
        for ax in axes:
            ax.set_ylim(bottom=0)
            blocks_axis(ax)
        axes[0].set_ylabel("largest singular value")
        name_runs(figure, [label for label, _ in runs])
        return svg(figure)


def invariance(runs: Sequence[tuple[str, Invariances]]) -> str:
    """A panel a kind of weight: how far the loss rises; hollow where the plan promises that it does not."""
    kinds = [kind for kind in (*KINDS, INPUT) if any(row.kind == kind for _, found in runs for row in found.rows)]
    factors = sorted((*FACTORS, 1.0))
    with styled():
        figure, axes = panels(len(kinds), 4, (2.3, 2.0), sharex=True, sharey=True)
        for ax, kind in zip(axes, kinds, strict=True):
            for run, (_, found) in enumerate(runs):
                for row in (row for row in found.rows if row.kind == kind):
                    losses = dict(zip(FACTORS, row.losses, strict=True)) | {1.0: found.loss}
                    rises = [losses[factor] - found.loss for factor in factors]
                    face = "white" if row.exact else color(run)
                    ax.plot(factors, rises, "o-", color=color(run), markerfacecolor=face, markersize=4, linewidth=1.2)
            ax.set_xscale("log")
            ax.set_xticks(factors, [f"{factor:g}" for factor in factors], fontsize=7.5)
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_yscale("symlog", linthresh=1e-3)
            ax.set_title(kind)
        figure.supxlabel("factor", fontsize=9)
        figure.supylabel("change of the loss (nats per token)", fontsize=9)
        more = [("promised to be 0", {"marker": "o", "markerfacecolor": "white"})]
        name_runs(figure, [label for label, _ in runs], more)
        return svg(figure)


def _kinds(present: Sequence[str]) -> list[str]:
    return [kind for kind in KINDS if kind in present]


def _normal_quantiles() -> list[float]:
    """Of |x| for a standard normal x, at LEVELS."""
    from scipy.stats import norm

    return [float(norm.isf(level / 2)) for level in LEVELS]
