"""Begin a launch of frozen code and print its folder: ``python -m launch begin FROZEN``, inside a SLURM job."""

from __future__ import annotations

import os
import time
from pathlib import Path

from launch.launches import Launch, committed_step
from models.errors import ConfigError
from pretrain.arguments import Parser
from pretrain.cli import load
from pretrain.config import RunConfig


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m launch begin", description=__doc__)
    parser.add_argument("frozen", type=Path, help="what launch freeze printed")
    parser.add_argument("--nodes", nargs="+", default=[], help="the hosts of the allocation")
    given = parser.parse_args(arguments)
    config = given.frozen / "config.yaml"
    if not config.exists():
        raise ConfigError(f"{given.frozen} has no config.yaml: name a folder that launch freeze printed")
    if (job := os.environ.get("SLURM_JOB_ID")) is None:
        raise ConfigError("begin: SLURM_JOB_ID is not set: it is for a SLURM job (train.sbatch)")
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    print(begin(load(config), [str(config)], given.frozen / "code", given.nodes, job, restart).folder)
    return 0


def begin(
    config: RunConfig,
    arguments: list[str],
    code: Path,
    nodes: list[str],
    job: str | None = None,
    restart: int | None = None,
) -> Launch:
    """A launch that is written down. ``arguments``: what ``config`` was read from; ``code``: where is imported from."""
    run = Path(config.runs_dir) / config.name
    launch = Launch(str(run), arguments, str(code), time.time(), committed_step(run), nodes, job, restart)
    try:
        launch.create()
    except FileExistsError:
        raise ConfigError(
            f"{launch.folder} is there already: another launch writes there, or the cluster counts its jobs anew; "
            "rename that folder"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write the run's folder {run}: {error.strerror}") from None
    return launch
