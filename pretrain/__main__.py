"""``python -m pretrain CONFIG.yaml [--section.key value ...]``, alone or under torchrun."""

from __future__ import annotations

import errno
import logging
import sys
from pathlib import Path

from models.errors import ConfigError
from pretrain.cli import USAGE, help_text, load
from pretrain.distributed import joined, rank_in_environment


def _fail(message: str) -> int:
    rank = rank_in_environment()
    print(f"error: {message}" if rank == 0 else f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    return 2


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(help_text(), end="")
        return 0
    if not arguments or arguments[0].startswith("--"):
        return _fail("no configuration file: write " + USAGE.splitlines()[0])
    try:
        config = load(Path(arguments[0]), arguments[1:])
    except ConfigError as error:  # the same on every rank: say it once
        return _fail(str(error)) if rank_in_environment() == 0 else 2
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        # Imported here, so that --help and a mistake in the configuration answer at once.
        from pretrain.trainer import Outcome, Trainer

        with joined(config.device, config.parallel) as world:
            trainer = Trainer(config, world)
            outcome = trainer.run()
            if world.is_main and outcome is Outcome.FINISHED:
                print(trainer.closing_line())
            elif world.is_main and outcome is Outcome.STOPPED:
                print(f"stopped: step {trainer.step} of {trainer.counts.steps}, run {trainer.folder.path}")
            return outcome.value
    except ConfigError as error:
        return 2 if error.agreed and rank_in_environment() != 0 else _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = Path(config.runs_dir) / config.name
        return _fail(f"no space left for {where}: make room, then start again to go on from the last checkpoint")
    except KeyboardInterrupt:
        print("interrupted: start again to go on from the last committed checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
