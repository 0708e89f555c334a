"""A run's folder: what is in it, and whether it may be gone on with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from models.errors import ConfigError
from pretrain.cli import build, dump, flatten, parse_yaml
from pretrain.config import RunConfig
from pretrain.distributed import World
from pretrain.files import write_atomically
from pretrain.lock import FolderLock

# Keys that may differ when a run is gone on with: they change where and how fast, or what is done after a spike, not
# what is trained.
MAY_CHANGE = (
    "runs_dir",
    "device",
    "data.path",
    "data.prefetch",
    "data.verify",
    "train.micro_batch",
    "train.loss_chunk",
    "train.compile",
    "train.cuda_graphs",
    "train.kernels",
    "train.activation_checkpointing",
    "train.checkpoint_every_block",
    "train.rollback.",
    "parallel.",
    "checkpoint.",
    "validate.",
    "log.",
)
FROZEN_REVISION = "revision.json"  # beside the rooms of a copy of the code
PACKAGES = ("torch", "deepspeed", "torchao", "numpy", "datasets", "sentencepiece", "tensorboard", "pydantic")


class RunFolder:
    """Paths under ``runs_dir/name``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FolderLock | None = None
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.deepspeed = path / "deepspeed.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer.model"

    def read_config(self) -> RunConfig:
        """The configuration that the run was started with."""
        try:
            text = self.config.read_text(encoding="utf-8")
        except OSError:
            raise ConfigError(f"{self.path} is not a run's folder: it has no config.yaml") from None
        return build(parse_yaml(text, str(self.config)), str(self.config))

    def claim(
        self, config: RunConfig, tokenizer: Path, world: World, deepspeed: Mapping[str, Any] | None = None
    ) -> None:
        """Make the folder ``config``'s, or check that it is, and hold it against other processes until ``release``.
        Call on one rank (Ranks.first). ``deepspeed``: its derived configuration, to be read by a person."""
        try:
            if self.config.exists():
                self._check_same(config)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path, config.parallel.silence)
            self._lock.acquire()
            write_atomically(self.config, dump(config).encode())
            write_atomically(self.environment, _json(environment(world)))
            if deepspeed:
                write_atomically(self.deepspeed, _json(deepspeed))
            else:
                self.deepspeed.unlink(missing_ok=True)
            write_atomically(self.tokenizer, tokenizer.read_bytes())
        except OSError as error:
            self.release()
            raise ConfigError(f"cannot write the run's folder {self.path}: {error.strerror}") from None

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def is_ours(self) -> bool:
        """Whether this process still holds the folder. One that was frozen for long may find another in its place."""
        return self._lock is None or self._lock.is_ours

    def _check_same(self, config: RunConfig) -> None:
        there, here = flatten(self.read_config()), flatten(config)
        for key, value in here.items():
            if value != there[key] and not key.startswith(MAY_CHANGE):
                raise ConfigError(
                    f"{self.path} was started with {key} {there[key]}, not {value}: write --name for a new run, or "
                    f"python -m pretrain {self.config} to go on with this one"
                )

    def records(self) -> list[dict[str, Any]]:
        """The objects of metrics.jsonl, without a last line that a kill or a full disk tore; none before the first."""
        if not self.metrics.exists():
            return []
        records = []
        for number, line in enumerate(self.metrics.read_bytes().splitlines(keepends=True), start=1):
            try:
                if line.endswith(b"\n"):
                    records.append(json.loads(line))
            except ValueError:
                raise ConfigError(f"{self.metrics} line {number} is no metrics line: repair it or remove it") from None
        return records

    def last_validation(self) -> dict[str, Any]:
        """The last of the records that has a validation loss; empty if there is none."""
        return next((record for record in reversed(self.records()) if "val_loss" in record), {})


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def revision() -> dict[str, Any]:
    """Of the code that runs: as git has it, None where it is no checkout; or as git had it when it was frozen."""
    frozen = Path(__file__).parent.parent / FROZEN_REVISION
    if frozen.exists():
        return dict(json.loads(frozen.read_text(encoding="utf-8")))
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"git_revision": _git("rev-parse", "HEAD"), "git_changes": bool(changes)}


def environment(world: World) -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, revision, hardware, world size, command line."""
    cuda = world.device.type == "cuda"
    return {
        "command": sys.orig_argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        **revision(),
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "system": platform.platform(),
    }
