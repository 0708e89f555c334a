"""What 8 bits do to a model's loss: int8 and fp8, of weights or of activations too, as a table and layer by layer.

    python -m tools.numerics runs/llama runs/dyt runs/dnt
    python -m tools.numerics runs/dyt --formats int8,int4 --layers int4-w-row --sequences 128
    python -m tools.numerics runs/7b --layers none --head --device cuda

Rounding is simulated: the linears of the blocks multiply values of the format, scaled by the largest magnitude of a
tensor or of each row (weights: an output channel; activations: a token), in fp32. That says what is lost, not how fast
it is. Every change of loss is paired over windows of the run's validation split and has a 95 % interval. Layer by
layer, the loss is that with one linear rounded and the rest in fp32. The newest checkpoint of each run counts.

Treatments are named FORMAT-w-tensor, FORMAT-w-row (weights only), FORMAT-wa-tensor, FORMAT-wa-row (activations too);
formats are int8, fp8 (e4m3), fp8-e5m2, int4 and, as a reference without scales, bf16.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from models import ConfigError
from pretrain.arguments import Parser
from pretrain.checkpoint.commit import committed_steps
from pretrain.run import RunFolder
from tools.command import require_device, run
from tools.loading import load_run
from tools.page import check_packages, make_folder
from tools.quantizing.formats import DEFAULT, Treatment, parse_formats, parse_treatment, treatments
from tools.quantizing.losses import Windows, read_windows
from tools.quantizing.measuring import Question, measure, passes
from tools.quantizing.report import write_measured
from tools.quantizing.sections import summary
from tools.report import labels


def main() -> None:
    arguments = _parser().parse_args()
    paths: list[Path] = arguments.runs
    question = _question(arguments)
    _check(arguments)
    output: Path = arguments.output or paths[0] / "numerics"
    windows = [_windows(path, arguments.sequences) for path in paths]
    make_folder(output)  # every mistake before the first forward
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    measured = []
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, path, read in zip(labels(paths), paths, windows, strict=True):
            trained = load_run(path, torch.device(arguments.device))
            task = progress.add_task(name, total=len(read[0]) * passes(trained, question))
            measured.append(measure(name, path, trained, read, question, partial(progress.advance, task)))
    write_measured(measured, question, output)
    print(summary(measured, question))
    print(f"\nreport: {output / 'report.html'}")


def _question(arguments: argparse.Namespace) -> Question:
    formats = parse_formats(arguments.formats)
    layers: Treatment | None = None
    if arguments.layers is None:  # the harshest
        layers = Treatment(formats[0], activations=True, per_row=False)
    elif arguments.layers != "none":
        layers = parse_treatment(arguments.layers)
    return Question(treatments(formats), layers, arguments.head)


def _check(arguments: argparse.Namespace) -> None:
    check_packages()
    require_device(arguments.device)
    if arguments.sequences < 2:
        raise ConfigError(f"--sequences is {arguments.sequences}: write 2 or more; one tells nothing of chance")
    resolved = [path.resolve() for path in arguments.runs]
    if twice := [path for path in arguments.runs if resolved.count(path.resolve()) > 1]:
        raise ConfigError(f"{twice[0]} is named twice: name every run once")


def _windows(path: Path, sequences: int) -> Windows:
    folder = RunFolder(path)
    config = folder.read_config()
    if not committed_steps(folder.checkpoints):
        raise ConfigError(f"{path} has no checkpoint yet: train it first, python -m pretrain {folder.config}")
    return read_windows(config, path, sequences)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.numerics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs' folders; the first is the reference")
    parser.add_argument(
        "--formats",
        default=",".join(DEFAULT),
        metavar="A,B,…",
        help=f"(default {','.join(DEFAULT)}; bf16 is always there)",
    )
    parser.add_argument(
        "--layers",
        metavar="TREATMENT",
        help="what is done layer by layer, or none (default: the first format's weights and activations, per tensor)",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=32,
        metavar="N",
        help="windows of the validation split, spread evenly (default 32)",
    )
    parser.add_argument(
        "--head", action="store_true", help="round the head too in the first table (embeddings never are)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="(default: numerics in the first run's folder)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default cpu)")
    return parser


if __name__ == "__main__":
    run(main)
