"""``python -m launch COMMAND ...``: what the scripts of this folder call, and ``status``, which a person does."""

from __future__ import annotations

import sys
from importlib import import_module

from models.errors import ConfigError, nearest

COMMANDS = {
    "local": "train on this machine (launch/torchrun.sh)",
    "freeze": "copy code and configuration into the run's folder, print where (launch/submit.sh)",
    "begin": "begin a launch of frozen code, print its folder (launch/train.sbatch)",
    "node": "torchrun on one node of a launch (launch/node.sh)",
    "decide": "after a launch: start again, or end (launch/train.sbatch)",
    "health": "devices, network, disks and clocks, before the first step (launch/node.sh)",
    "status": "where a run stands",
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, *(f"  {name:8}{meaning}" for name, meaning in COMMANDS.items()), sep="\n")
        return 0 if arguments else 2
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"launch has no command {arguments[0]!r}; {nearest(arguments[0], COMMANDS)}")
        return int(import_module(f"launch.{arguments[0]}").main(arguments[1:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
