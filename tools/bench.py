"""Throughput of a configuration's training step beside nanoGPT's, or another configuration's, on this machine.

    python -m tools.bench configs/tiny.yaml --pairs 7 --steps 5 --output bench.jsonl
    python -m tools.bench configs/tiny.yaml --model.plan llama --against configs/tiny.yaml
    python -m tools.bench configs/tiny.yaml --log.inspect_every 100 --against configs/tiny.yaml --steps 100

All that is compared is alive at once and takes turns, so that what else the machine does falls on all alike; a ratio
is of two measurements in the same round. A step is all that training does in it: the loader's batch, forward,
backward, clipping, update. Against nanoGPT (tools/nanogpt.py) each precision, eager and compiled, has two contenders:
the configuration's own model and optimizer, and "stack", nanoGPT's model on our trunk with AdamW, whose ratio shows
what loss, loader and optimizer give at an identical parameter count; only GELU's form differs (tanh or exact). Sizes,
micro-batches and data are the configuration's for all. The third command measures what log.inspect costs, the
writing of it included: each of its rounds has one inspected step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from rich.console import Console
from rich.progress import Progress

from models.errors import ConfigError, nearest
from pretrain.cli import load
from pretrain.config import RunConfig
from pretrain.data import open_source
from pretrain.distributed import joined
from pretrain.run import environment
from pretrain.trainer import resolve_vocabulary
from tools.command import run
from tools.contenders import VARIANTS, Contender, of_two, variant_of, with_nanogpt

_WARMUP = 2  # steps before the first round: compilation, allocations, the optimizer's state
_SETTLE = 1  # untimed steps at each turn: caches, and the loader's queue, which filled up while others had theirs


def measure(contenders: Sequence[Contender], pairs: int, steps: int, device: torch.device) -> np.ndarray:
    """Tokens per second, fp64 [contenders, pairs]; a column is a round in which each had its turn."""
    rates = np.empty((len(contenders), pairs))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(contenders) * (pairs + 1))
        for turn in range(-1, pairs):
            for i, contender in enumerate(contenders):
                stage = f"round {turn + 1} of {pairs}" if turn >= 0 else "warming up"
                progress.update(task, description=f"{stage}: {contender.variant} {contender.name}")
                for _ in range(_SETTLE if turn >= 0 else _WARMUP):
                    contender.steps.step()
                _wait(device)
                if turn >= 0:
                    began = time.perf_counter()
                    for _ in range(steps):
                        contender.steps.step()
                    _wait(device)
                    rates[i, turn] = steps * contender.tokens / (time.perf_counter() - began)
                progress.advance(task)
    return rates


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(contenders: Sequence[Contender], rates: np.ndarray) -> list[str]:
    """A line for each contender: medians over the rounds with their spread, and ratios to its base, round by round."""
    lines = [
        f"{'variant':<13}{'parameters':>14}{'tokens/s':>12}{'quartiles':>22}{'min to max':>22}{'ratio':>8}"
        f"{'min to max':>17}  contender"
    ]
    for contender, rate in zip(contenders, rates, strict=True):
        low, first, middle, third, high = np.percentile(rate, (0, 25, 50, 75, 100))
        ratio = rate / rates[contender.base]
        lines.append(
            f"{contender.variant:<13}{contender.parameters:>14,}{middle:>12,.0f}{f'{first:,.0f} to {third:,.0f}':>22}"
            f"{f'{low:,.0f} to {high:,.0f}':>22}{np.median(ratio):>8.3f}"
            f"{f'{ratio.min():.3f} to {ratio.max():.3f}':>17}  {contender.name}"
        )
    return lines


def as_shipped(
    contenders: Sequence[Contender], rates: np.ndarray, name: str, variant: str, device: torch.device
) -> list[str]:
    """The configuration as it stands against nanoGPT as its README runs it on such a device, if both were measured:
    fp32 without compilation on a CPU, bf16 with it on a GPU."""
    shipped = "bf16+compile" if device.type == "cuda" else "fp32"
    places = {(c.name, c.variant): i for i, c in enumerate(contenders)}
    mine, theirs = places.get((name, variant)), places.get(("nanogpt", shipped))
    if mine is None or theirs is None:
        return []
    ratio = rates[mine] / rates[theirs]
    return [
        f"{name} as it says ({variant}) to nanogpt as it runs on {device.type} ({shipped}): "
        f"{np.median(ratio):.3f} ({ratio.min():.3f} to {ratio.max():.3f})"
    ]


def record(contenders: Sequence[Contender], rates: np.ndarray) -> list[dict[str, Any]]:
    """What --output gets of each contender; ``rates`` as ``measure`` gives them."""
    return [
        {
            "name": contender.name,
            "variant": contender.variant,
            "parameters": contender.parameters,
            "tokens_per_step": contender.tokens,
            "tokens_per_second": [round(x, 1) for x in rate.tolist()],
            "ratio": [round(x, 4) for x in (rate / rates[contender.base]).tolist()],
            "base": contender.base,
        }
        for contender, rate in zip(contenders, rates, strict=True)
    ]


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the rest, which are the configuration's overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        usage="%(prog)s CONFIG.yaml [--section.key value ...] [options]",
        description="Throughput of a configuration's training step beside nanoGPT's or another configuration's.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what to measure, as for python -m pretrain")
    parser.add_argument(
        "--against", default="nanogpt", metavar="WHAT", help="nanogpt (default), or another configuration file"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(VARIANTS)} (default: all against nanogpt, else what the configurations say)",
    )
    parser.add_argument("--pairs", type=int, default=7, metavar="N", help="rounds of measurements (default 7)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps in each (default 5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the results as one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    for name in ("pairs", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}: write a positive number")
    for variant in options.variants or ():
        if variant not in VARIANTS:
            raise ConfigError(f"--variants: there is no variant {variant!r}; {nearest(variant, VARIANTS)}")
    if options.against != "nanogpt" and not options.against.endswith((".yaml", ".yml")):
        raise ConfigError(f"--against is {options.against!r}: write nanogpt, or the name of a .yaml file")
    return options, overrides


def open_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """A configuration whose vocabulary is known and whose data is checked."""
    config = load(path, overrides)
    return resolve_vocabulary(config, open_source(config.data, config.seed).vocabulary)


def main(arguments: Sequence[str]) -> None:
    options, overrides = parse(arguments)
    config = open_config(options.config, overrides)
    every = config.log.inspect_every
    if every and options.steps % every:
        near = max(1, round(options.steps / every)) * every
        raise ConfigError(
            f"--steps is {options.steps}: with log.inspect_every {every} write a multiple of it, as {near}"
        )
    name = " ".join([str(options.config), *overrides])
    # A model beyond dynamo's limit of recompilations would run eagerly and be reported as compiled.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    with joined(config.device) as world, ExitStack() as opened:
        if world.size > 1:
            raise ConfigError("a benchmark is of one process: start it without torchrun")
        if options.against == "nanogpt":
            built = with_nanogpt(config, name, options.variants or list(VARIANTS), world)
        else:
            other = open_config(Path(options.against), ())
            built = of_two(config, name, other, options.against, options.variants or [], world)
        contenders = []
        for contender in built:
            opened.callback(contender.steps.close)
            contenders.append(contender)
        rates = measure(contenders, options.pairs, options.steps, world.device)
        threads = f", {torch.get_num_threads()} threads" if world.device.type == "cpu" else ""
        print(f"{options.pairs} rounds of {options.steps} steps on {world.device.type}{threads}")
        for line in table(contenders, rates) + as_shipped(contenders, rates, name, variant_of(config), world.device):
            print(line)
        if options.output is not None:
            rounds = {"pairs": options.pairs, "steps": options.steps}
            result = {**environment(world), **rounds, "contenders": record(contenders, rates)}
            try:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
            except OSError as error:
                raise ConfigError(f"cannot write {options.output}: {error.strerror}") from None


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
