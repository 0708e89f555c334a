"""What a benchmark found: tables with medians, spread and limits, as text, Markdown, JSON and a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from models.errors import ConfigError
from pretrain.files import write_atomically
from tools.benching.timing import Spread
from tools.tables import number, share, table

_WIDE = 30.0  # times the least value from which on an axis is logarithmic


@dataclass(frozen=True)
class Row:
    """``values``: one a round; none if it was not measured, for which ``why`` has the reason. ``limit``: the best that
    the machine allows, in the same unit. ``more``: further columns."""

    name: str
    values: Sequence[float]
    limit: float | None = None
    more: Mapping[str, str | float | None] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Table:
    """``unit`` is one per second where more is better, and a time where less is (``is_cost``)."""

    title: str
    unit: str
    rows: Sequence[Row]
    is_cost: bool = False
    share: str = "of the limit"  # what the column is called

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The head, and a line for each row."""
        more = list(dict.fromkeys(key for row in self.rows for key in row.more))
        limited = any(row.limit is not None for row in self.rows)
        remarked = any(row.why and not row.values for row in self.rows)
        several = any(len(row.values) > 1 for row in self.rows)
        head = ["", self.unit, *(["quartiles", "least to most"] if several else [])]
        head += ["limit", self.share] if limited else []
        lines = []
        for row in self.rows:
            line = [row.name]
            if row.values:
                low, first, middle, third, high = Spread.of(row.values)
                line += [_figure(middle), *([_span(first, third), _span(low, high)] if several else [])]
                if limited:
                    line += [_figure(row.limit), share(self._of_limit(row, middle))]
            else:
                line += ["–"] * (len(head) - 1)
            cells = [row.more.get(key) for key in more]
            line += [cell if isinstance(cell, str) else _figure(cell) for cell in cells]
            lines.append(line + ([row.why if not row.values else ""] if remarked else []))
        return [*head, *more, *(["remark"] if remarked else [])], lines

    def _of_limit(self, row: Row, middle: float) -> float | None:
        if row.limit is None or not middle:
            return None
        return row.limit / middle if self.is_cost else middle / row.limit


@dataclass(frozen=True)
class Report:
    """``environment``: machine, versions and command; ``settings``: rounds and the like; ``notes``: a line each."""

    title: str
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    tables: Sequence[Table]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """For a terminal."""
        parts = [f"{self.title}: {_settings(self.settings)}"]
        for one in self.tables:
            head, lines = one.cells()
            parts.append("\n".join([one.title, *_aligned([head, *lines])]))
        return "\n\n".join([*parts, *(["\n".join(self.notes)] if self.notes else [])])

    def markdown(self) -> str:
        """With the command and the machine at the end."""
        parts = [f"# {self.title}", _settings(self.settings)]
        for one in self.tables:
            parts.append(f"## {one.title}\n\n{table(*one.cells())}")
        parts += [f"- {note}" for note in self.notes]
        known = self.environment
        command = " ".join(str(word) for word in known.get("command", ()))
        versions = ", ".join(f"{name} {v}" for name, v in known.get("packages", {}).items() if v is not None)
        machine = f"{known.get('device')}, {known.get('cpus')} CPUs, {known.get('threads')} threads"
        software = f"{known.get('system')}; Python {known.get('python')}, {versions}; git {known.get('git_revision')}"
        parts += [f"`{command}`", f"{machine}, {software}"]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """results.json, table.md and picture.svg, over those of an earlier measurement."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps(asdict(self), indent=1, default=list).encode() + b"\n"
            write_atomically(folder / "results.json", content)
            write_atomically(folder / "table.md", self.markdown().encode())
            write_atomically(folder / "picture.svg", picture(self).encode())
        except OSError as error:
            raise ConfigError(f"cannot write to --output {folder}: {error.strerror}") from None

    def give(self, folder: Path | None) -> None:
        """To standard output, and to ``folder`` if there is one."""
        print(self.text())
        if folder is not None:
            self.write(folder)
            print(f"results: {folder}", file=sys.stderr)


def require_pictures(folder: Path | None) -> None:
    """ConfigError, before anything is measured, if the picture of it could not be drawn."""
    if folder is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--output draws a picture, which needs matplotlib: pip install matplotlib") from None


def picture(report: Report) -> str:
    """SVG: for each table a panel, for each row its rounds as dots, their median, and the limit."""
    from tools.picture import GRAY, color, panels, styled, svg

    tables = [one for one in report.tables if any(row.values for row in one.rows)]
    with styled():
        if not tables:
            figure, axes = panels(1, 1, (7.0, 1.0))
            axes[0].text(0.5, 0.5, "nothing was measured", ha="center", va="center")
            return svg(figure)
        longest = max(len(one.rows) for one in tables)
        figure, axes = panels(len(tables), 1, (7.5, 0.7 + 0.3 * longest))
        for ax, one in zip(axes, tables, strict=True):
            of = [row.name.split(": ")[-1] for row in one.rows]  # "dyt: eager" looks like all eager
            kinds = list(dict.fromkeys(of))
            for place, row in enumerate(one.rows):
                own = color(kinds.index(of[place]))
                if not row.values:
                    ax.annotate(row.why, (0.01, place), xycoords=("axes fraction", "data"), va="center", color=GRAY)
                    continue
                ax.plot(row.values, [place] * len(row.values), "o", color=own, markersize=4, alpha=0.5, linewidth=0)
                middle = Spread.of(row.values).median
                ax.plot([middle], [place], "|", color=own, markersize=13, markeredgewidth=2)
                if row.limit is not None:
                    ax.plot([row.limit], [place], marker="|", color=GRAY, markersize=13, markeredgewidth=1)
            ax.set_yticks(range(len(one.rows)), [row.name for row in one.rows])
            ax.set_ylim(len(one.rows) - 0.4, -0.6)
            seen = [value for row in one.rows for value in [*row.values, *([row.limit] if row.limit else [])]]
            if min(seen) > 0 and max(seen) > _WIDE * min(seen):
                ax.set_xscale("log")
            elif one.unit == "ratio":
                ax.axvline(1.0, color=GRAY, linewidth=0.8)
            else:
                ax.set_xlim(left=0)
            ax.set_xlabel(f"{one.unit}{'; gray: the limit' if any(row.limit for row in one.rows) else ''}")
            ax.set_title(one.title)
        return svg(figure)


def _span(low: float, high: float) -> str:
    return f"{_figure(low)} to {_figure(high)}"


def _figure(value: float | None) -> str:
    """Four digits, and of large numbers all before the point."""
    return f"{value:,.0f}" if value is not None and 1e6 <= value < 1e13 else number(value, 4)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, figures to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
