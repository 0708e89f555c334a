"""``python -m pretrain CONFIG.yaml [--section.key value ...]``, alone, under torchrun or under srun."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # A request to stop waits until the loop looks for it (control.py). What else a launcher blocks, ranks inherit.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1})

import errno
import logging
import sys
from pathlib import Path

from models.errors import ConfigError
from pretrain import launched
from pretrain.cli import USAGE, help_text, load
from pretrain.rank import rank_in_environment


def _fail(message: str) -> int:
    rank = rank_in_environment()
    launched.report(2, message)
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
        code = _fail(str(error)) if rank_in_environment() == 0 else 2
        return launched.exit_code(code)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        # Imported here, so that --help and a mistake in the configuration answer at once.
        from pretrain.distributed import joined
        from pretrain.trainer import Outcome, Trainer

        with joined(config.device, config.parallel) as world:
            trainer = Trainer(config, world)
            outcome = trainer.run()
            if world.is_main:
                line = trainer.last_line(outcome)
                launched.report(outcome.value, line, step=trainer.step, reason=trainer.stopped.name.lower())
                print(line, file=sys.stderr if outcome is Outcome.DIVERGED else sys.stdout)
            return launched.exit_code(outcome.value)
    except ConfigError as error:
        code = 2 if error.agreed and rank_in_environment() != 0 else _fail(str(error))
        return launched.exit_code(code) if error.agreed else code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = Path(config.runs_dir) / config.name
        return _fail(f"no space left for {where}: make room, then start again to go on from the last checkpoint")
    except KeyboardInterrupt:
        interrupted = "interrupted: start again to go on from the last committed checkpoint"
        launched.report(130, interrupted)
        print(interrupted, file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
