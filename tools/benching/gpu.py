"""All that a GPU is asked, in one command that keeps to a time: each part a process of its own, each result kept.

A part that fails, does not fit or takes too long is a row that says why, and the next one begins. The order is that
of importance: what there is no time for is at the end. A dry run takes the same way at toy size on a CPU.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from models.errors import ConfigError
from pretrain.files import write_atomically
from tools.benching.processes import started
from tools.benching.synthetic import random_tokens
from tools.tables import table

_CONFIGS = Path("configs/models")
_ROOMY = 120e9  # bytes of a GPU on which three 1.3B models with AdamW and their activations live side by side
_LEAST = 15.0  # seconds below which no part is begun
_VOCABULARY = 32000
_TOY: dict[str, Any] = {
    "device": "cpu",
    "model": {"width": 64, "depth": 2, "heads": 2, "ffn_width": 128, "context": 64},
    "data": {"sequence_length": 64},
    "train": {"batch_tokens": 128, "micro_batch": 1, "compile": False, "cuda_graphs": False},
}


@dataclass(frozen=True)
class Part:
    """``arguments``: of tools.bench; ``seconds``: as long as it may take."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """``state``: "done", or why there is nothing; ``result``: what the part wrote, empty without."""

    part: Part
    state: str
    seconds: float
    result: dict[str, Any]


def parts(folder: Path, memory: float, dry: bool) -> list[Part]:
    """What is measured, most important first; the configurations for it are written into ``folder``.

    ``memory``: bytes of the GPU. Batches are small, since a step's speed does not depend on how often its
    micro-batches are repeated.
    """
    data = folder / "data"
    random_tokens(data, _VOCABULARY, 1 << (14 if dry else 22))

    def config(name: str, base: str, **changes: dict[str, Any]) -> str:
        tree: dict[str, Any] = {"base": str((_CONFIGS / base).absolute()), "name": name}
        for section, values in changes.items():
            tree[section] = dict(values)
        tree.setdefault("data", {})["path"] = str(data.absolute())
        if dry:
            for section, values in _TOY.items():
                tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return str(path)

    small: dict[str, Any] = {"batch_tokens": 32768, "micro_batch": 8 if memory >= _ROOMY else 4}
    one = config("1.3b", "llama-1.3b.yaml", train=small)
    kinds = ("tensorwise", "rowwise")
    eight = [config(f"1.3b-{kind}", "llama-1.3b.yaml", train=small, precision={"fp8": kind}) for kind in kinds]
    three = config("3b", "llama-3b.yaml", train={"batch_tokens": 16384, "micro_batch": 2})
    fused, plain = (
        config(f"1.3b-dnt{name}", "llama-1.3b.yaml", model={"plan": "dnt"}, train=small | {"kernels": kind})
        for name, kind in (("", "auto"), ("-without-kernels", "torch"))
    )
    vocabulary = {"vocab_size": _VOCABULARY}
    tiny: dict[str, Any] = {"batch_tokens": 4096, "micro_batch": 4, "compile": True}
    replayed, launched = (
        config(f"124m{name}", "gpt-124m.yaml", model=vocabulary, train=tiny | {"cuda_graphs": bool(name)})
        for name in ("-cuda-graphs", "")
    )
    seven = config(
        "7b-msgdw-bf16-momentum",
        "llama-7b.yaml",
        train={"batch_tokens": 16384, "micro_batch": 1, "activation_checkpointing": "full"},
        optimizer={"name": "msgdw", "lr": 0.1, "momentum": 0.9, "state_dtype": "bf16"},
    )
    often = ("--rounds", "2", "--steps", "1") if dry else ("--rounds", "5", "--steps", "3")
    seldom = ("--rounds", "1", "--steps", "1") if dry else ("--rounds", "3", "--steps", "2")
    shapes = "--tokens 64 --width 64 --heads 2 --ffn_width 128 --vocabulary 128 --length 32 --device cpu --rounds 1"
    toy = (*shapes.split(), "--only", "dyt,cross_entropy")
    liger = ("--against", "liger") if importlib.util.find_spec("liger_kernel") else ()
    together = [("1.3b-plans", "llama,dnt,dyt")]
    if memory < _ROOMY and not dry:
        together = [(f"1.3b-{plan}", plan) for plan in ("llama", "dnt", "dyt")]
    return [
        *(Part(name, ("model", one, "--plans", plans, *often), 150) for name, plans in together),
        Part("1.3b-profile", ("profile", one, "--steps", "2" if dry else "3"), 60),
        Part("kernels", ("kernels", *liger, *(toy if dry else often[:2])), 120),
        *(Part(f"3b-{plan}", ("model", three, "--plans", plan, *seldom), 90) for plan in ("llama", "dnt", "dyt")),
        Part("7b-one-card", ("model", seven, "--plans", "llama", *seldom), 150),
        Part("1.3b-dnt-kernels", ("model", fused, "--against", plain, *seldom), 90),
        Part("124m-cuda-graphs", ("model", replayed, "--against", launched, *seldom), 90),
        Part("1.3b-fp8", ("model", eight[0], "--against", f"{one},{eight[1]}", *seldom), 120),
        Part("1.3b-hf", ("model", one, "--plans", "llama", "--against", "hf", *seldom), 120),
    ]


def run(folder: Path, minutes: float, dry: bool) -> list[Outcome]:
    """Everything there is time for, in ``folder``; its results.json and table.md are written again after each part."""
    if not dry and not gpu_memory():
        raise ConfigError("no GPU is visible here: write --dry-run for the same at toy size on a CPU")
    deadline = time.monotonic() + 60 * minutes
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to --output {folder}: {error.strerror}") from None
    console, outcomes = Console(stderr=True, highlight=False, soft_wrap=True), list[Outcome]()
    for part in parts(folder, gpu_memory(), dry):
        left = deadline - time.monotonic()
        with console.status(f"{part.name}: {left:.0f} s left"):
            outcomes.append(_outcome(part, folder, min(part.seconds, left)))
        console.print(f"{part.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", markup=False)
        write(folder, outcomes)
    return outcomes


def gpu_memory() -> float:
    """Bytes of the first GPU, 0 without one; asked in a process of its own, as a context would take some of them."""
    ask = "import torch; print(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _outcome(part: Part, folder: Path, limit: float) -> Outcome:
    if limit < min(_LEAST, part.seconds):
        return Outcome(part, "not begun: no time was left", 0.0, {})
    own, began = folder / part.name, time.monotonic()
    (own / "results.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.bench", *part.arguments, "--output", str(own)]
    with started(command) as (process, last):
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        words = last()
    seconds = time.monotonic() - began
    if code is None:
        return Outcome(part, f"stopped: it took longer than {limit:.0f} s", seconds, {})
    if code:
        return Outcome(part, f"failed: {words.removeprefix('error: ')}", seconds, {})
    return Outcome(part, "done", seconds, json.loads((own / "results.json").read_text(encoding="utf-8")))


def write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """results.json: a list of parts with their results; table.md: how each ended, then its own table.md."""
    found = [
        {"part": o.part.name, "arguments": o.part.arguments, "state": o.state, "seconds": o.seconds, "result": o.result}
        for o in outcomes
    ]
    write_atomically(folder / "results.json", json.dumps(found, indent=1).encode() + b"\n")
    rows = [
        [o.part.name, o.state, f"{o.seconds:.0f}", f"`tools.bench {shlex.join(o.part.arguments)}`"] for o in outcomes
    ]
    text = ["# What a GPU was asked", table(["part", "state", "s", "command"], rows)]
    machine = ""
    for outcome in outcomes:
        if outcome.result:
            *paragraphs, machine = (folder / outcome.part.name / "table.md").read_text("utf-8").strip().split("\n\n")
            text += paragraphs
    text.append(machine)
    write_atomically(folder / "table.md", "\n\n".join(text).encode() + b"\n")
