"""The report's sections: what ``--only`` names, what each measures, and what writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.progress import Progress

from tools.inspecting import writing_layers, writing_weights
from tools.inspecting.activations import look_at_attention, look_at_outliers
from tools.inspecting.gradients import look_at_gradients
from tools.inspecting.history import look_at_history
from tools.inspecting.invariance import look_at_invariance
from tools.inspecting.sites import look_at_sites
from tools.inspecting.spectra import look_at_spectra
from tools.inspecting.subject import Subject
from tools.inspecting.written import Inspected, Measure, Written


class Section(NamedTuple):
    title: str
    write: Callable[[Sequence[Inspected]], Written]
    measures: tuple[Measure, ...]


SECTIONS: dict[str, Section] = {
    "alpha": Section("Alpha beside 1/std of its input", writing_layers.alpha, (look_at_sites, look_at_history)),
    "scatter": Section("What each site does to its input", writing_layers.scatter, (look_at_sites,)),
    "outliers": Section("Activation outliers", writing_layers.outliers, (look_at_outliers,)),
    "entropy": Section("Attention entropy", writing_layers.entropy, (look_at_attention,)),
    "gradients": Section("Tails of the gradient", writing_weights.gradients, (look_at_gradients,)),
    "noise": Section("Gradient noise", writing_weights.noise, (look_at_gradients,)),
    "spectra": Section("Singular values", writing_weights.spectra, (look_at_spectra,)),
    "invariance": Section("Invariance to scaling", writing_weights.invariance, (look_at_invariance,)),
    "history": Section("Over time", writing_layers.history, (look_at_history,)),
}


def inspect(subject: Subject, names: Sequence[str], progress: Progress) -> Inspected:
    """Each measure that one of the sections needs, once."""
    measures = dict.fromkeys(measure for name in names for measure in SECTIONS[name].measures)
    return Inspected(subject.label, subject.facts, {measure: measure(subject, progress) for measure in measures})
