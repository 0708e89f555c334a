"""torchrun on one node of a launch, and what it needs around it: ``python -m launch node LAUNCH ...``.

torchrun is called in this process, not as a command, for two reasons.

Signals. SLURM sends one to every process of a step, an administrator to one of them. torchrun dies of SIGUSR1, and on
SIGTERM it gives its ranks 30 seconds (before torch 2.12, without a way to change it) to save what may take minutes.
So the signals that ask for a stop are blocked here. A thread takes them and writes the launch's stop file, which the
run's first rank reads once it can: one way, for any node, however early. Ranks inherit that, and look for a SIGUSR1 of
their own in each step (pretrain/control.py).

Errors. A rank's failure is one line with its log, instead of torchrun's traceback of itself.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from launch.launches import HEALTH, Launch, read
from models.errors import ConfigError
from pretrain import launched
from pretrain.arguments import Parser

ASKING = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m launch node", description=__doc__.splitlines()[0])
    parser.add_argument("launch", type=Path, help="the launch's folder, which launch begin printed")
    parser.add_argument("--address", required=True, help="the host of the first node")
    parser.add_argument("--port", type=int, required=True, help="the ranks meet there")
    parser.add_argument("--health", action="store_true", help="run the health check instead of the training")
    parser.add_argument("--dry-run", action="store_true", help="only show torchrun's command")
    given = parser.parse_args(arguments)
    launch = read(given.launch)
    try:
        rank, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_STEP_NUM_NODES"])
    except KeyError as error:
        raise ConfigError(f"node: {error.args[0]} is not set: it is for a step of a SLURM job (train.sbatch)") from None
    place = ["--nnodes", str(nodes), "--node-rank", str(rank), "--rdzv-id", launch.identity]
    place += ["--master-addr", given.address, "--master-port", str(given.port)]
    if given.dry_run:
        print(show(*plan(launch, place, rank == 0, given.health)))
        return 0
    return torchrun(launch, place, first=rank == 0, health=given.health)


def torchrun(launch: Launch, place: list[str], first: bool = True, health: bool = False) -> int:
    """Start this node's ranks and wait for them: 0, or 1 if one failed.

    ``place``: torchrun's options about where the nodes meet. ``first``: this is the first node, whose first rank is
    shown on the console.
    """
    if not health:
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)  # before anything starts a thread
        threading.Thread(target=_pass_on, args=(launch,), daemon=True).start()
    settings, options = plan(launch, place, first, health)
    os.environ |= settings
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if not health:  # which has said what it found
            died = "" if failure.exitcode > 0 else f" ({signal.Signals(-failure.exitcode).name})"
            line = f"error: rank {rank} on host {socket.gethostname()} ended with exit code {failure.exitcode}{died}"
            launched.crashed(line)
            print(f"{line}; what it printed is in {launch.folder}", file=sys.stderr)
        return 1
    except SignalException:
        print("interrupted: start again to go on from the last committed checkpoint", file=sys.stderr)
        return 130
    return 0


def plan(
    launch: Launch, place: list[str], first: bool = True, health: bool = False
) -> tuple[dict[str, str], list[str]]:
    """What is added to the environment, and torchrun's command line."""
    import torch

    wanted = os.environ.get("LAUNCH_RANKS_PER_NODE") or str(torch.cuda.device_count() or 1)
    if not wanted.isdecimal() or int(wanted) == 0:
        raise ConfigError(f"LAUNCH_RANKS_PER_NODE is {wanted!r}: write how many ranks a node has, or leave it empty")
    ranks = int(wanted)
    settings = {
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "${role_name}",  # the role is empty: lines stay as they were printed
        "TORCHELASTIC_ERROR_FILE_DISABLED": "1",
    }
    if not health:
        settings[launched.VARIABLE] = str(launch.folder)
    if "OMP_NUM_THREADS" not in os.environ:
        settings["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    logs = launch.folder / ("health" if health else "ranks") / socket.gethostname()
    options = [*place, "--nproc-per-node", str(ranks), "--max-restarts", "0", "--role", ""]
    options += ["--log-dir", str(logs), "--redirects", "3"]
    if first:
        options += ["--tee", "0:3"]
    check = ["launch", "health", launch.run, "--json", str(launch.folder / HEALTH)]
    program = check if health else ["pretrain", *launch.arguments]
    # torchrun replaces ${local_rank} and the like in its program's arguments, and $$ by $ (string.Template).
    return settings, [*options, "-m", *(word.replace("$", "$$") for word in program)]


def show(settings: dict[str, str], options: list[str]) -> str:
    """The same as a command that a shell takes."""
    return " ".join(
        [*(f"{key}={shlex.quote(value)}" for key, value in settings.items()), "torchrun", shlex.join(options)]
    )


def _pass_on(launch: Launch) -> None:
    interrupts = 0
    while True:
        number = signal.sigwait(ASKING)
        with suppress(OSError):  # a file server that is away; the ranks have the signal too
            launch.ask_to_stop(f"{signal.Signals(number).name} on {socket.gethostname()}")
        interrupts += number == signal.SIGINT
        if interrupts > 1:  # whoever presses twice does not want to wait: torchrun ends the ranks of this signal
            os.kill(os.getpid(), signal.SIGHUP)
