"""Speed beside other people's and beside what the machine allows, in one run: medians and spread over rounds.

    python -m tools.bench model configs/tiny.yaml --against nanogpt,hf --variants fp32 fp32+compile
    python -m tools.bench model configs/tiny.yaml --plans llama,dnt,dyt
    python -m tools.bench model configs/tiny.yaml --log.inspect_every 100 --against configs/tiny.yaml --steps 100
    python -m tools.bench data configs/tiny.yaml
    python -m tools.bench checkpoint configs/tiny.yaml
    python -m tools.bench startup configs/tiny.yaml --against hf,nanogpt
    python -m tools.bench profile configs/tiny.yaml
    python -m tools.bench kernels --against liger
    python -m tools.bench gpu --minutes 10 --output gpu

All that is compared takes turns after a round of warming up, so that what else the machine does falls on all alike;
a ratio is of two measurements in the same round. With --output, results.json, table.md and picture.svg are written
into a folder, over those of an earlier measurement. `python -m tools.bench model --help` has the options of one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from models.errors import ConfigError, nearest
from pretrain.arguments import Parser
from pretrain.cli import load
from pretrain.config import RunConfig
from pretrain.data import open_source
from pretrain.distributed import World, joined
from pretrain.telemetry import memory_gb
from pretrain.trainer import resolve_vocabulary
from tools.benching import checkpoint, data, gpu, kernels, model, profile, startup
from tools.benching.contenders import PEERS, VARIANTS, lineup, variant_of
from tools.benching.machine import describe
from tools.benching.operations import CASES, Shapes, check_names
from tools.benching.report import Report, Table, require_pictures
from tools.command import run
from tools.formats.lazy import DTYPES


def main(arguments: Sequence[str]) -> None:
    options, overrides = _parser().parse_known_args(arguments)
    if overrides and "config" not in options:
        name = options.benchmark
        raise ConfigError(f"{name} has no option {overrides[0]}: see python -m tools.bench {name} --help")
    for name in ("rounds", "steps", "batches", "minutes", "limit"):
        if name in options and not getattr(options, name) > 0:
            raise ConfigError(f"--{name} is {getattr(options, name)}: write a positive number")
    _check_names(options)
    require_pictures(options.output)
    # A model beyond dynamo's limit of recompilations would run eagerly and be reported as compiled.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    measure: Callable[[argparse.Namespace, list[str]], None] = options.measure
    try:
        measure(options, overrides)
    except torch.OutOfMemoryError as error:
        fewer = "lower train.micro_batch, or compare fewer at once"
        raise ConfigError(f"out of memory: {str(error).splitlines()[0]} {fewer}") from None


def _check_names(options: argparse.Namespace) -> None:
    """What is compared in ``model``, before anything is opened."""
    for variant in getattr(options, "variants", None) or ():
        if variant not in VARIANTS:
            raise ConfigError(f"--variants: there is no variant {variant!r}; {nearest(variant, VARIANTS)}")
    for other in (options.against or ()) if options.benchmark == "model" else ():
        if other not in PEERS and not other.endswith((".yaml", ".yml")):
            raise ConfigError(f"--against: there is no {other!r}; {nearest(other, PEERS)}, or name a .yaml file")


def open_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A configuration whose vocabulary is known and whose data is checked."""
    config = load(path, overrides)
    return resolve_vocabulary(config, open_source(config.data, config.seed).vocabulary)


def _report(
    options: argparse.Namespace,
    world: World,
    subject: str,
    tables: Sequence[Table],
    notes: Sequence[str] = (),
    **settings: Any,
) -> None:
    if world.is_main:
        settings |= {"device": world.device.type}
        Report(f"{options.benchmark} of {subject}", describe(world), settings, tables, notes).give(options.output)


def _one_process(world: World) -> None:
    if world.size > 1:
        raise ConfigError("this benchmark is of one process: start it without torchrun")


def _named(options: argparse.Namespace, overrides: Sequence[str]) -> str:
    return " ".join([str(options.config), *overrides])


def _model(options: argparse.Namespace, overrides: list[str]) -> None:
    config, name = open_config(options.config, overrides), _named(options, overrides)
    every = config.log.inspect_every
    if every and options.steps % every:
        near = max(1, round(options.steps / every)) * every
        raise ConfigError(
            f"--steps is {options.steps}: with log.inspect_every {every} write a multiple of it, as {near}"
        )
    own = [(name, config)]
    if options.plans:
        own = [(plan, replace(config, model=replace(config.model, plan=plan))) for plan in options.plans]
    against = options.against if options.against is not None else [] if options.plans else ["nanogpt"]
    others = [(other, None if other in PEERS else open_config(Path(other))) for other in against]
    with joined(config.device) as world, ExitStack() as opened:
        _one_process(world)
        contenders = []
        for contender in lineup(own, others, options.variants or [], world):
            opened.callback(contender.steps.close)
            contenders.append(contender)
        turns = model.measure(contenders, options.rounds, options.steps, world.device)
        tables = [model.speed_table(contenders, turns, options.steps, world.device)]
        if model.pairs(contenders):
            tables.append(model.ratio_table(contenders, model.rates(contenders, turns, options.steps)))
        notes = model.remarks(contenders, turns, options.steps, variant_of(config), world.device)
        notes.append(f"most memory of all together: {memory_gb(world.device):.1f} GB")
        _report(options, world, name, tables, notes, rounds=options.rounds, steps=options.steps)


def _data(options: argparse.Namespace, overrides: list[str]) -> None:
    config = open_config(options.config, overrides)
    with joined(config.device) as world:
        _one_process(world)
        found = data.measure(config, world, options.rounds, options.batches, options.steps)
        counts = {"rounds": options.rounds, "batches": options.batches, "steps": options.steps}
        _report(options, world, _named(options, overrides), *data.tables(config, found), **counts)


def _checkpoint(options: argparse.Namespace, overrides: list[str]) -> None:
    config = open_config(options.config, overrides)
    with joined(config.device) as world, tempfile.TemporaryDirectory(dir=_folder(options)) as own:
        shared = [own]
        if world.size > 1:
            torch.distributed.broadcast_object_list(shared, group=world.control)
        costs = checkpoint.measure(config, world, Path(shared[0]), options.rounds, options.steps)
        tables = checkpoint.tables(costs) if world.is_main else []
        settings = {"rounds": options.rounds, "ranks": world.size}
        _report(options, world, _named(options, overrides), tables, **settings)


def _startup(options: argparse.Namespace, overrides: list[str]) -> None:
    against = list(startup.PEERS) if options.against is None else options.against
    startup.check_peers(against)
    config = open_config(options.config, overrides)
    with joined(config.device) as world, tempfile.TemporaryDirectory(dir=_folder(options)) as own:
        _one_process(world)
        found = startup.measure(config, world.device.type, against, Path(own), options.rounds, options.limit)
        _report(options, world, _named(options, overrides), [found], rounds=options.rounds)


def _profile(options: argparse.Namespace, overrides: list[str]) -> None:
    config = open_config(options.config, overrides)
    with joined(config.device) as world:
        _one_process(world)
        found = profile.measure(config, world, options.steps)
        notes = [f"a step takes {1e3 * found.plain:.4g} ms, {1e3 * found.profiled:.4g} ms under the profiler"]
        _report(
            options,
            world,
            _named(options, overrides),
            [profile.table(found, profile.limits(config, world.device))],
            notes,
            steps=options.steps,
        )


def _kernels(options: argparse.Namespace, overrides: list[str]) -> None:
    names = options.only or list(CASES)
    check_names(names)
    for other in options.against or []:
        if other != "liger":
            raise ConfigError(f"--against is {other!r}: kernels are measured against liger")
    sizes = {field.name: getattr(options, field.name) for field in fields(Shapes)}
    shapes = Shapes(**sizes | {"dtype": DTYPES[options.dtype]})
    with joined(options.device) as world:
        tables = list(kernels.measure(names, shapes, world.device, options.rounds, bool(options.against)))
        settings = sizes | {"rounds": options.rounds}
        _report(options, world, "models/kernels", tables, **settings)


def _gpu(options: argparse.Namespace, overrides: list[str]) -> None:
    folder = options.output or Path("gpu-bench")
    gpu.run(folder, options.minutes, options.dry_run)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"results: {folder}", file=sys.stderr)


def _folder(options: argparse.Namespace) -> str | None:
    if options.folder is not None and not options.folder.is_dir():
        raise ConfigError(f"--folder {options.folder} is no folder: make it, on the disk to measure")
    return options.folder


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.bench",
        usage="%(prog)s BENCHMARK [CONFIG.yaml] [--section.key value ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    several = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", prog="python -m tools.bench", required=True)

    def benchmark(name: str, measure: Callable[..., None], what: str, rounds: int | None = 5) -> Callable[..., Any]:
        own = several.add_parser(name, help=what, description=what, allow_abbrev=False)
        own.set_defaults(measure=measure)
        if name not in ("kernels", "gpu"):
            own.add_argument(
                "config", type=Path, metavar="CONFIG.yaml", help="as for python -m pretrain, overrides too"
            )
        if rounds is not None:
            text = f"rounds of measurements (default {rounds})"
            own.add_argument("--rounds", type=int, default=rounds, metavar="N", help=text)
        own.add_argument(
            "--output", type=Path, metavar="FOLDER", help="results.json, table.md and picture.svg go there"
        )
        return own.add_argument

    def steps(add: Callable[..., Any], default: int = 5) -> None:
        add("--steps", type=int, default=default, metavar="N", help=f"training steps in a turn (default {default})")

    add = benchmark("model", _model, "training steps: tokens per second, MFU, the loader's share, ratios", 7)
    what = f"some of {', '.join(PEERS)}, or configuration files (default nanogpt, with --plans none)"
    add("--against", type=_names, metavar="A,B,...", help=what)
    add("--plans", type=_names, metavar="A,B,...", help="the configuration under several plans, held against the first")
    what = f"of {', '.join(VARIANTS)} (default: as the configurations say)"
    add("--variants", nargs="+", metavar="NAME", help=what)
    steps(add)
    add = benchmark("data", _data, "the loader alone, beside what the model needs and nanoGPT's memory map")
    add("--batches", type=int, default=100, metavar="N", help="batches in a loader's turn (default 100)")
    steps(add)
    add = benchmark("checkpoint", _checkpoint, "saves and loads, beside torch.save and safetensors; under torchrun too")
    add("--folder", type=Path, metavar="FOLDER", help="on the disk to measure (default: where temporary files go)")
    steps(add, 6)
    add = benchmark(
        "startup", _startup, "from the command to the first step, and from a restart, beside peers' scripts"
    )
    add("--against", type=_names, metavar="A,B,...", help=f"of {', '.join(startup.PEERS)} (default both)")
    add("--folder", type=Path, metavar="FOLDER", help="for the runs (default: where temporary files go)")
    add("--limit", type=float, default=600, metavar="S", help="seconds that a process may take (default 600)")
    add = benchmark("profile", _profile, "where a step's time goes, by family of operation", None)
    steps(add)
    add = benchmark("kernels", _kernels, "every fused kernel, forward and backward, beside eager, compiled and Liger")
    add("--against", type=_names, metavar="liger", help="Liger's kernels, where it has them")
    add("--only", type=_names, metavar="A,B,...", help="some of the kernels (default all)")
    for size in fields(Shapes):
        if size.name != "dtype":
            add(f"--{size.name}", type=int, default=size.default, metavar="N", help=f"(default {size.default})")
    add("--dtype", choices=DTYPES, default="bf16", help="(default bf16)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)")
    add = benchmark("gpu", _gpu, "all that one GPU is asked, within some minutes, each part a process of its own", None)
    add("--minutes", type=float, default=10, metavar="N", help="for all of it (default 10)")
    add("--dry-run", action="store_true", help="every part at toy size on the CPU")
    return parser


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
