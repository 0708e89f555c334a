"""What was measured, as a report: its figures, its text, and all of it for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from math import expm1, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from tools.page import FIGURES, write_report
from tools.quantizing.measuring import Measured, Question
from tools.quantizing.sections import TITLE, sections
from tools.studies.statistics import Interval


def write_measured(measured: Sequence[Measured], question: Question, folder: Path) -> None:
    """Write the report of what was measured into ``folder``."""
    drawn = _draw(measured, question)
    text = sections(measured, question, {name: f"{FIGURES}/{name}.svg" for name in drawn})
    write_report(folder, TITLE, text, drawn, results(measured, question))


def _draw(measured: Sequence[Measured], question: Question) -> dict[str, str]:
    """SVG by the figure's name."""
    from tools.quantizing import figures

    drawn = {"changes": figures.changes(measured)}
    if question.layers is not None:
        drawn["layers"] = figures.layers(measured, question.layers)
        drawn["signals"] = figures.signals(measured, question.layers)
    return drawn


def results(measured: Sequence[Measured], question: Question) -> dict[str, Any]:
    """What other programs may want of it: nats a token, dB; null for what is not finite."""
    return {
        "head": question.head,
        "layers": None if question.layers is None else question.layers.name,
        "runs": [_run(run) for run in measured],
    }


def _run(run: Measured) -> dict[str, Any]:
    return {
        "name": run.name,
        "run": str(run.path),
        "plan": run.config.model.plan,
        "step": run.step,
        "parameters": run.parameters,
        "windows": len(run.losses),
        "window_tokens": run.windows[1].shape[1],
        "loss": fmean(run.losses),
        "window_losses": run.losses,
        "treatments": {
            treatment.name: {**_change(run.change(losses)), "window_losses": losses}
            for treatment, losses in run.treated.items()
        },
        "layers": [
            {"block": block, "kind": kind, **_change(run.change(losses))}
            for (block, kind), losses in run.layers.items()
        ],
        "weights": [{"block": one.block, "kind": one.kind, **_finite(one.ratio._asdict())} for one in run.weights],
        "inputs": [
            {
                **_finite(one.ratio._asdict()),
                **{key: value for key, value in one._asdict().items() if key in ("block", "kinds")},
                **_finite({"over_6": one.over, "kurtosis": one.kurtosis, "largest_over_median": one.largest}),
            }
            for one in run.inputs
        ],
    }


def _change(found: Interval) -> dict[str, Any]:
    return {"change": found.mean, "low": found.low, "high": found.high, "perplexity_change": expm1(found.mean)}


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {key: value if isfinite(value) else None for key, value in values.items()}
