"""What a section is given and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.progress import Progress
from torch import Tensor

from tools.inspecting.subject import Subject

Measure = Callable[[Subject, Progress], Any]


class Inspected(NamedTuple):
    """One run: what it is, and what each measure found."""

    label: str
    facts: dict[str, Any]
    found: dict[Measure, Any]


@dataclass
class Written:
    """A section as Markdown under its title, its figures as SVG by their names, and of each run, in their order, what
    other programs may want of it and one line for the terminal."""

    text: str
    figures: dict[str, str] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def of_runs(runs: Sequence[Inspected], measure: Measure) -> list[tuple[str, Any]]:
    """(label, finding) of each."""
    return [(run.label, run.found[measure]) for run in runs]


def picture(caption: str, name: str) -> str:
    """Where a figure stands in the text."""
    return f"![{caption}](figures/{name}.svg)"


def plain(value: Any) -> Any:
    """What JSON can write of it: named tuples by their fields, tensors as lists, null for what is not finite."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: plain(part) for key, part in value._asdict().items()}
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
