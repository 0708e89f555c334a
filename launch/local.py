"""Train on this machine, one process for each GPU, or one on a CPU: ``bash launch/torchrun.sh CONFIG.yaml ...``."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from launch.begin import begin
from launch.launches import Launch
from launch.node import plan, show, torchrun
from models.errors import ConfigError
from pretrain.cli import load

_MEET = ["--standalone"]


def main(arguments: list[str]) -> int:
    """The run's own exit code, which torchrun would have made 1."""
    dry = arguments[:1] == ["--dry-run"]
    given = arguments[dry:]
    if not given or given[0].startswith("--"):
        raise ConfigError("no configuration file: write bash launch/torchrun.sh CONFIG.yaml [--section.key value ...]")
    config = load(Path(given[0]), given[1:])
    home = Path(__file__).parent.parent
    if dry:
        run = Path(config.runs_dir) / config.name
        print(show(*plan(Launch(str(run), given, str(home), time.time(), 0, []), _MEET)))
        return 0
    launch = begin(config, given, home, [socket.gethostname()])
    ended = torchrun(launch, _MEET)
    outcome = launch.outcome
    return ended if outcome is None else int(outcome["code"])
