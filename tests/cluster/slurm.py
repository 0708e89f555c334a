"""A real SLURM inside a test: ``Slurm.start(folder, 2)`` brings slurmctld and two nodes up on this machine.

Nodes are namespaces (``sim/start.sh`` says what they share and what not), the daemons are Debian's own. The cluster
lives as long as the process that started it, however that ends.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import Signals
from typing import Literal, Self

SIM = Path(__file__).parent / "sim"
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged", "ip", "bridge", "ps", "nsenter", "unshare")
Fault = Literal["kill", "boot", "cut", "heal", "drop", "undrop", "hang", "unhang"]  # sim/fault.sh explains them

_PERIOD = 0.1  # seconds between two looks at the queue


def _environment(**more: str) -> dict[str, str]:
    return os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"} | more  # where daemons are


def obstacle() -> str | None:
    """Why no cluster can run here, and what would change that; None if nothing is in the way."""
    if missing := [program for program in PROGRAMS if shutil.which(program, path=_environment()["PATH"]) is None]:
        return f"not installed: {', '.join(missing)}; run `make cluster` as root on Debian or Ubuntu"
    if os.geteuid() != 0:
        return "nodes are namespaces and need root; run the tests as root"
    probe = "ip link add br0 type bridge && ip link add veth1 type veth peer name eth0 && mount -t tmpfs tmpfs /run"
    namespaces = ["unshare", "--pid", "--fork", "--mount", "--propagation=private", "--net", "--uts", "--ipc"]
    tried = subprocess.run(
        [*namespaces, "--mount-proc", "sh", "-c", probe],
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode != 0:
        return f"namespaces are refused ({tried.stderr.strip()}); run in a virtual machine or a privileged container"
    return None


class SlurmError(AssertionError):
    """A command on the cluster failed, or what a test waits for did not come."""


class Slurm:
    """A cluster: controller and login node "ctl", nodes "n1", "n2", ... Jobs are named by their number, as a string.

    Partition "main" is the default; a job in "high" preempts those in "main", which requeue.
    """

    def __init__(self, folder: Path, nodes: int, gpus: int, kill_wait: int) -> None:
        self.folder = folder
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self._settings = {"LIFELINE": "1", "GPUS": str(gpus), "KILL_WAIT": str(kill_wait)}
        self._jobs: list[str] = []  # that were submitted
        self._power_on()

    @classmethod
    def start(cls, folder: Path, nodes: int, *, gpus: int = 0, kill_wait: int = 2) -> Self:
        """A cluster whose ``nodes`` are idle, with its logs in ``folder``, which all nodes share (so not in /run).

        A node has ``gpus`` pretend GPUs, 16 processors and 2 TB of memory; ``kill_wait`` is in seconds, from the
        SIGTERM of a cancelled job to its SIGKILL. Raises SlurmError if it does not come up.
        """
        return cls(folder, nodes, gpus, kill_wait)

    def _power_on(self) -> None:
        reader, writer = os.pipe()
        self._lifeline = os.fdopen(writer, "wb")  # the cluster ends when it is closed, as it is with this process
        try:
            command: list[object] = [SIM / "start.sh", self.folder, len(self.nodes)]
            _run(command, env=_environment(**self._settings), stdin=reader, timeout=90)
        except BaseException:
            self._lifeline.close()
            raise
        finally:
            os.close(reader)

    def stop(self) -> None:
        """Power off; every process of every node is gone when this returns."""
        self._lifeline.close()
        _run([SIM / "stop.sh", self.folder], timeout=30)

    def restart(self) -> None:
        """Power off and on: no job, process or fault is left, and jobs are counted from 1 again."""
        self.stop()
        self._jobs.clear()
        self._power_on()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    # ------------------------------------------------------------------ nodes

    def on(
        self,
        node: str,
        *command: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        check: bool = True,
        timeout: float = 60,
    ) -> str:
        """Standard output of ``command`` on "ctl" or a node. ``env`` is added to the environment.

        Raises SlurmError with its standard error if it fails (unless not ``check``), or takes ``timeout`` seconds.
        """
        line = [SIM / "on.sh", self.folder, node, *command]
        return _run(line, env=_environment(**(env or {})), cwd=cwd, check=check, timeout=timeout)

    def processes(self, node: str) -> dict[int, str]:
        """Command lines by the pid that they have on ``node``, those of SLURM and of this look included."""
        lines = self.on(node, "ps", "-ww", "-e", "-o", "pid=,args=").splitlines()
        return {int(pid): arguments for pid, arguments in (line.split(maxsplit=1) for line in lines)}

    def signal(self, node: str, pid: int, number: Signals) -> None:
        """Signal one process of ``node``, as ``processes`` numbers them."""
        self.on(node, "kill", f"-{number.value}", pid)

    def fault(self, operation: Fault, node: str) -> None:
        """Something happens to ``node``, and lasts until it is taken back or ``restart``."""
        _run([SIM / "fault.sh", self.folder, operation, node], timeout=30)

    def nodes_in(self, state: str) -> list[str]:
        """The nodes that SLURM has in ``state``: "idle", "alloc", "down", "drain" ..."""
        filters = ("--partition=main", f"--states={state}")
        return self.on("ctl", "sinfo", "--noheader", "--Node", *filters, "--format=%N").split()

    # ------------------------------------------------------------------ jobs

    def sbatch(self, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Submit; the job's number. ``env`` reaches the job; output files without a folder land in ``cwd``."""
        job = self.on("ctl", "sbatch", "--parsable", *arguments, env=env, cwd=cwd).split(";")[0]
        self._jobs.append(job)
        return job

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says, as "JobState", "RestartCount", "BatchHost", "StdOut" ...; of an array the
        first task that it lists."""
        record = self.on("ctl", "scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)", record))

    def requeue(self, job: str) -> None:
        """Stop the job and let it run again: some ``kill_wait`` + 6 seconds later."""
        self.on("ctl", "scontrol", "requeue", job)

    def cancel(self, job: str) -> None:
        self.on("ctl", "scancel", job)

    def until(self, what: str, condition: Callable[[], object], timeout: float, period: float = _PERIOD) -> None:
        """Wait until ``condition`` is true; SlurmError with the state of the cluster after ``timeout`` seconds.
        ``period``: seconds between two looks."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise SlurmError(f"not within {timeout:g} s: {what}\n{self.overview()}")
            time.sleep(period)

    def until_state(self, job: str, *states: str, timeout: float = 30) -> dict[str, str]:
        """Wait until ``job`` is in one of ``states`` ("RUNNING", "COMPLETED", ...); what ``job`` says then."""
        self.until(f"job {job} is {' or '.join(states)}", lambda: self.job(job)["JobState"] in states, timeout)
        return self.job(job)

    # ------------------------------------------------------------------ reports

    def overview(self) -> str:
        """The queue and the nodes, as SLURM shows them."""
        return "\n".join(self.on("ctl", *command, check=False) for command in (("squeue",), ("sinfo", "-N", "-l")))

    def record(self, lines: int = 20) -> dict[str, str]:
        """For a test that failed: the overview, and the last lines of each of SLURM's logs and each job's output."""
        files = sorted((self.folder / "log").glob("slurm*.log"))
        files += [Path(self.job(job)["StdOut"]) for job in self._jobs]
        tails = {str(file): file.read_text(errors="replace").splitlines() for file in files if file.is_file()}
        return {"slurm": self.overview()} | {name: "\n".join(tail[-lines:]) for name, tail in tails.items()}


def _run(
    command: list[object],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    cwd: Path | None = None,
    check: bool = True,
) -> str:
    """Its standard output, less white space around it."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            env=env or _environment(),
            stdin=stdin,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise SlurmError(f"{' '.join(words)}: not done after {timeout:g} s") from expired
    if check and done.returncode != 0:
        raise SlurmError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr.strip()}")
    return done.stdout.strip()
