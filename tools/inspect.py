"""Look inside trained runs: their sites, activations, gradients, weights and attention.

    python -m tools.inspect runs/tiny
    python -m tools.inspect runs/llama runs/dnt --only gradients,noise --sequences 64
    python -m tools.inspect runs/imported --text novel.txt --device cuda

The model is that of the newest checkpoint, or of --step. It runs in fp32, without dropout, on --sequences of its data:
held-out ones, and for gradients those that it would be trained on next; or on --text. Written are report.html, which
needs nothing else, report.md with figures/, and results.json. Several runs stand side by side in the same pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from models.errors import ConfigError, nearest
from pretrain.arguments import Parser
from tools.command import require_device, run
from tools.inspecting.sections import SECTIONS, inspect
from tools.inspecting.subject import open_subject
from tools.inspecting.written import Inspected, Written, plain
from tools.page import check_packages, make_folder, write_report
from tools.progress import counting
from tools.report import labels
from tools.tables import table


def main() -> None:
    arguments = _parser().parse_args()
    names = _sections(arguments.only)
    _check(arguments)
    output: Path = arguments.output or arguments.runs[0] / "inspect"
    if arguments.output is not None:
        make_folder(output)  # every mistake before the first forward
    with counting() as progress:
        runs = _look(arguments, names, progress)
        parts = {name: SECTIONS[name].write(runs) for name in progress.track(names, description="pictures")}
    _write(output, runs, parts)
    console = Console(highlight=False, soft_wrap=True)
    for place, one in enumerate(runs):
        facts = one.facts
        console.print(f"{one.label}: {facts['plan']}, {facts['optimizer']}, step {facts['step']}", markup=False)
        for name, part in parts.items():
            console.print(f"  {name:<11} {part.lines[place]}", markup=False)
    console.print(f"report: {output / 'report.html'}", markup=False)


def _look(arguments: argparse.Namespace, names: Sequence[str], progress: Progress) -> list[Inspected]:
    """One model at a time."""
    device = torch.device(arguments.device)
    task = progress.add_task("", total=len(arguments.runs))
    found = []
    for folder, label in zip(arguments.runs, labels(arguments.runs), strict=True):
        progress.update(task, description=label)
        subject = open_subject(folder, label, arguments.step, arguments.sequences, arguments.text, device)
        found.append(inspect(subject, names, progress))
        progress.advance(task)
    return found


def _write(output: Path, runs: Sequence[Inspected], parts: dict[str, Written]) -> None:
    title = "Inside " + ", ".join(one.label for one in runs)
    figures = {name: svg for part in parts.values() for name, svg in part.figures.items()}
    text = "\n\n".join(
        [f"# {title}", _facts(runs), *(f"## {SECTIONS[name].title}\n\n{part.text}" for name, part in parts.items())]
    )
    results = [
        plain(one.facts | {name: part.results[place] for name, part in parts.items()}) for place, one in enumerate(runs)
    ]
    write_report(output, title, text + "\n", figures, results)


def _facts(runs: Sequence[Inspected]) -> str:
    head = ["run", "step", "plan", "optimizer", "parameters", "width", "blocks", "heads", "sequences", "of tokens"]
    rows = []
    for one in runs:
        facts: dict[str, Any] = one.facts
        heads = f"{facts['heads']}" + (f" over {facts['kv_heads']}" if facts["kv_heads"] != facts["heads"] else "")
        rows.append(
            [
                one.label,
                f"{facts['step']:,}",
                f"{facts['plan']}, {facts['trunk']} trunk" + (", tied head" if facts["tied"] else ""),
                facts["optimizer"],
                f"{facts['parameters']:,}",
                f"{facts['width']}",
                f"{facts['depth']}",
                heads,
                f"{facts['held_out_sequences']} held out, {facts['training_sequences']} of training",
                f"{facts['sequence_length']:,}",
            ]
        )
    return table(head, rows)


def _sections(only: str | None) -> list[str]:
    """In the report's order."""
    if only is None:
        return list(SECTIONS)
    asked = [name.strip() for name in only.split(",") if name.strip()]
    if not asked:
        raise ConfigError(f"--only names none: write some of {', '.join(SECTIONS)}, with commas between them")
    for name in asked:
        if name not in SECTIONS:
            raise ConfigError(f"--only: there is no section {name!r}; {nearest(name, SECTIONS)}")
    return [name for name in SECTIONS if name in asked]


def _check(arguments: argparse.Namespace) -> None:
    check_packages()
    require_device(arguments.device)
    if arguments.sequences < 2:
        raise ConfigError(f"--sequences is {arguments.sequences}: write 2 or more, noise is what two differ by")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs' folders")
    parser.add_argument("--only", metavar="A,B,…", help=f"sections of the report (default all: {', '.join(SECTIONS)})")
    parser.add_argument("--sequences", type=int, default=16, metavar="N", help="how much text to run on (default 16)")
    parser.add_argument(
        "--step", type=int, metavar="N", help="an earlier checkpoint that was kept (default: the newest)"
    )
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="plain text files instead of the run's data"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default cpu)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="(default: inspect/ in the first run's folder)")
    return parser


if __name__ == "__main__":
    run(main)
