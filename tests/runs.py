"""Small real runs for tests: a prepared corpus, a configuration, ``python -m pretrain`` and what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain.checkpoint import Checkpointer
from pretrain.data import austen
from pretrain.data.preparation import Settings, prepare

REPOSITORY = Path(__file__).parent.parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

TINY: dict[str, Any] = {
    "name": "small",
    "model": {"plan": "dnt", "width": 32, "depth": 2, "heads": 2, "context": 32},
    "data": {"sequence_length": 32},
    "train": {"steps": 20, "batch_tokens": 512},
    "optimizer": {"name": "msgdw", "lr": 0.1},
    "schedule": {"warmup_steps": 4},
    "log": {"every": 1, "tensorboard": False},
    "device": "cpu",
}


def prepare_corpus(folder: Path) -> Path:
    """A prepared folder in ``folder``: the first 400,000 characters of Emma in 20 documents, 512 pieces."""
    text = austen.novels()["Emma"][:400_000]
    source = folder / "text"
    source.mkdir(parents=True)
    for i in range(20):
        (source / f"{i:02}.txt").write_text(text[i * 20_000 : (i + 1) * 20_000])
    prepare([str(source)], folder / "prepared", Settings(vocab_size=512, validation_fraction=0.2), workers=1)
    return folder / "prepared"


def write_config(folder: Path, corpus: Path, *overrides: dict[str, Any]) -> Path:
    """TINY on ``corpus`` with runs under ``folder``, each section updated by ``overrides`` in turn."""
    tree = json.loads(json.dumps(TINY)) | {"runs_dir": str(folder / "runs")}
    tree["data"]["path"] = str(corpus)
    for override in overrides:
        for key, value in override.items():
            tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def pretrain(config: Path, *arguments: str, ranks: int = 1, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """``python -m pretrain``, under torchrun if there are several ranks."""
    if ranks == 1:
        command = [sys.executable, "-m", "pretrain"]
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, "-m", "pretrain"]
    return subprocess.run(
        [*command, str(config), *arguments],
        cwd=REPOSITORY,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions: everything in the metrics but the clock and the memory."""
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "batch_hash", "val_loss", "val_bits_per_byte")
    return [tuple(record.get(key) for key in keys) for record in metrics(run)]


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a committed checkpoint, read without knowing the model."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.format_utils import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {f"{part}.{name}": value for part, entries in state.items() for name, value in entries.items()}


def committed_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-????????"))


__all__ = [
    "Checkpointer",
    "checkpoint_tensors",
    "committed_steps",
    "curve",
    "metrics",
    "prepare_corpus",
    "pretrain",
    "write_config",
]
