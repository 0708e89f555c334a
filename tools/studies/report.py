"""A study's report: its figures, its text, and what other programs may want of it."""

from __future__ import annotations

from typing import Any

from tools.page import FIGURES, write_report
from tools.studies.grid import Arm, named, tuned_keys
from tools.studies.sections import sections
from tools.studies.statistics import Interval
from tools.studies.verdict import Verdict


def write_verdict(verdict: Verdict) -> str:
    """Write the report into the study's folder; returns its Markdown."""
    figures = draw(verdict)
    text = sections(verdict, {name: f"{FIGURES}/{name}.svg" for name in figures})
    write_report(verdict.study.folder, verdict.study.name, text, figures, results(verdict))
    return text


def draw(verdict: Verdict) -> dict[str, str]:
    """SVG by the figure's name; those that the results so far allow."""
    from tools.studies import figures

    drawn: dict[str, str] = {}
    if any(result.loss is not None for result in verdict.final):
        drawn["final-losses"] = figures.final_losses(verdict)
        drawn["loss-curves"] = figures.loss_curves(verdict)
    if any(one.test is not None for one in verdict.comparisons):
        drawn["differences"] = figures.differences(verdict)
    for key in tuned_keys(verdict.study):
        drawn[f"sensitivity-{key}"] = figures.sensitivity(verdict, key)
    return drawn


def results(verdict: Verdict) -> dict[str, Any]:
    """What other programs may want of it."""
    study = verdict.study

    def arm(name: Arm) -> dict[str, Any]:
        rate, memory = verdict.speed(name)
        return {
            "arm": dict(zip(study.factors, name, strict=True)),
            "tuned": dict(verdict.chosen[name]) if name in verdict.chosen else None,
            "values_tried": len(study.candidates[name]),
            "at_edge": verdict.edges.get(name, []),
            "seeds": {str(result.cell.seed): result.loss for result in verdict.finals(name)},
            "loss": _numbers(verdict.loss(name)),
            "bits_per_byte": verdict.bits_per_byte(name),
            "tokens_per_second": rate,
            "memory_gb": memory,
        }

    return {
        "study": study.name,
        "cautions": verdict.cautions,
        "arms": [arm(name) for name in study.candidates],
        "comparisons": [
            {
                "arm": named(one.arm),
                "reference": named(one.reference),
                "difference": None if one.test is None else _numbers(one.test.difference),
                "p": None if one.test is None else one.test.p,
                "p_holm": one.adjusted,
                "reason": one.reason or None,
            }
            for one in verdict.comparisons
        ],
        "cells": {result.cell.config.name: result.state for result in verdict.cells},
    }


def _numbers(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else found._asdict()
