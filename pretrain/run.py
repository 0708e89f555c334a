"""A run's folder: what is in it, and whether it may be gone on with."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from models.errors import ConfigError
from pretrain.cli import build, dump, flatten, parse_yaml
from pretrain.config import RunConfig
from pretrain.distributed import World

# Keys that may differ when a run is gone on with: they change where and how fast, not what is trained.
MAY_CHANGE = (
    "runs_dir",
    "device",
    "data.path",
    "data.prefetch",
    "data.verify",
    "train.micro_batch",
    "train.loss_chunk",
    "train.compile",
    "parallel.",
    "checkpoint.",
    "validate.",
    "log.",
)
PACKAGES = ("torch", "numpy", "datasets", "sentencepiece", "tensorboard", "pydantic")


class RunFolder:
    """Paths under ``runs_dir/name``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
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

    def claim(self, config: RunConfig, tokenizer: Path, world: World) -> None:
        """Make the folder ``config``'s, or check that it is. Call on one rank (Ranks.first)."""
        try:
            if self.config.exists():
                self._check_same(config)
            self.path.mkdir(parents=True, exist_ok=True)
            _replace(self.config, dump(config))
            _replace(self.environment, json.dumps(environment(world), indent=2) + "\n")
            shutil.copyfile(tokenizer, self.tokenizer)
        except OSError as error:
            raise ConfigError(f"cannot write the run's folder {self.path}: {error.strerror}") from None

    def _check_same(self, config: RunConfig) -> None:
        there, here = flatten(self.read_config()), flatten(config)
        for key, value in here.items():
            if value != there[key] and not key.startswith(MAY_CHANGE):
                raise ConfigError(
                    f"{self.path} was started with {key} {there[key]}, not {value}: write --name for a new run, or "
                    f"python -m pretrain {self.config} to go on with this one"
                )

    def last_validation(self) -> dict[str, Any]:
        """The last object of metrics.jsonl that has a validation loss; empty if there is none."""
        last: dict[str, Any] = {}
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if "val_loss" in record:
                    last = record
        return last


def _replace(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


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


def environment(world: World) -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, revision, hardware, world size, command line."""
    cuda = world.device.type == "cuda"
    return {
        "command": sys.orig_argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_revision": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "system": platform.platform(),
    }
