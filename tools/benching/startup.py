"""From the command to the first step, and from a restart to its first: whole processes that take turns.

A process has its turn from the moment it is started until a file says that its first step is done (ours logs every
step for this); then it is killed. The round that warms up fills the page cache and the compiler's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.errors import ConfigError, nearest
from pretrain.cli import dump
from pretrain.config import RunConfig
from pretrain.counts import derive_counts
from tools.benching.contenders import largest_shard, require_prepared
from tools.benching.llamas import huggingface_settings, llama_sizes
from tools.benching.processes import started
from tools.benching.report import Row, Table
from tools.benching.timing import alternate

PEERS = ("hf", "nanogpt")
START, RESTART = "equipoise", "equipoise, from a checkpoint"
_POLL = 0.005  # seconds
_STOPPED = 75


def measure(config: RunConfig, device: str, peers: Sequence[str], folder: Path, rounds: int, limit: float) -> Table:
    """Seconds to the first step. ``folder`` is empty; ``limit``: seconds that a process may take."""
    for name in peers:
        require_prepared(config, name)
    run = replace(
        config,
        name="run",
        runs_dir=str(folder),
        log=replace(config.log, every=1, inspect_every=0),
        checkpoint=replace(config.checkpoint, every=0),
        validate=replace(config.validate, every=0),
    )
    (folder / "config.yaml").write_text(dump(run))
    start = [sys.executable, "-m", "pretrain", str(folder / "config.yaml")]
    metrics, fresh = folder / "run" / "metrics.jsonl", folder / "fresh" / "metrics.jsonl"
    _leave_checkpoint(start, metrics, limit)
    names = [START, RESTART, *peers]

    def turn(place: int, warming: bool) -> float:
        name = names[place]
        if name == START:
            shutil.rmtree(fresh.parent, ignore_errors=True)
            return _until([*start, "--name", "fresh"], fresh, limit)
        if name == RESTART:
            metrics.unlink(missing_ok=True)  # its next line is the restart's first
            return _until(start, metrics, limit)
        done = folder / f"{name}.done"
        done.unlink(missing_ok=True)
        return _until(_peer(run, device, name, done), done, limit)

    found = alternate(names, turn, rounds)
    rows = [Row(name, seconds) for name, seconds in zip(names, found, strict=True)]
    return Table("From the command to the first step", "s", rows, is_cost=True)


def check_peers(names: Sequence[str]) -> None:
    """ConfigError if one of them has no minimal script."""
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--against: startup has no script of {name!r}; {nearest(name, PEERS)}")


def _peer(config: RunConfig, device: str, name: str, done: Path) -> list[str]:
    sizes, length, counts = config.model, config.data.sequence_length, derive_counts(config, 1)
    file, dtype = largest_shard(config)
    model: dict[str, Any]
    if name == "hf":
        model = huggingface_settings(llama_sizes(sizes, length))
    else:
        model = {"vocabulary": sizes.vocabulary, "width": sizes.width, "depth": sizes.depth}
        model |= {"heads": sizes.heads, "length": length}
    settings = {
        "peer": name,
        "model": model,
        "file": str(file.absolute()),
        "windows": {"dtype": dtype, "length": length, "rows": counts.micro_batch},
        "device": device,
        "compiled": config.train.compile,
        "bf16": config.precision.compute == "bf16",
        "accumulation": counts.accumulation,
        "done": str(done),
    }
    return [sys.executable, "-m", "tools.benching.first_step", json.dumps(settings)]


def _leave_checkpoint(command: Sequence[str], metrics: Path, limit: float) -> None:
    """A run that was stopped, as a user stops it, after its first steps."""
    with _started(command, metrics, limit) as process:
        process.terminate()
        code = process.wait(limit)
    if code != _STOPPED:
        raise ConfigError(f"the run ended with {code} before it could be stopped: give it more train.steps")


def _until(command: Sequence[str], sign: Path, limit: float) -> float:
    began = time.perf_counter()
    with _started(command, sign, limit):
        return time.perf_counter() - began


@contextmanager
def _started(command: Sequence[str], sign: Path, limit: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has written something into ``sign``; on exit it is killed."""
    deadline = time.perf_counter() + limit
    with started(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as (process, last):
        while not (sign.exists() and sign.stat().st_size):
            if process.poll() is not None:
                raise ConfigError(f"{' '.join(command[1:3])} ended before its first step: {last()}")
            if time.perf_counter() > deadline:
                raise ConfigError(f"{' '.join(command[1:3])} took no step in {limit:g} s: write a longer --limit")
            time.sleep(_POLL)
        yield process
