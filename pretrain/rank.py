"""Which rank this process is, by what torchrun or srun left in its environment. Nothing else in the house reads that.

``srun --ntasks-per-node 8 python -m pretrain CONFIG.yaml`` starts one task a rank. srun tells each its place under
names of its own (srun(1), OUTPUT ENVIRONMENT VARIABLES), but not where they meet: that is the first task's host, at a
port that follows from the job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

PORTS = range(20_000, 30_000)  # below those that Linux hands out by itself (ip_local_port_range)


def rank_in_environment() -> int:
    """0 where nobody started several."""
    return int((os.environ | adopted()).get("RANK", "0"))


def adopted() -> dict[str, str]:
    """For a task of srun's, what torchrun would have set; nothing else."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    return variables(os.environ)


def port(job: int) -> int:
    """For a job's ranks to meet at: another one for jobs that share a host, and one to spare after it."""
    return PORTS.start + 2 * job % len(PORTS)


def first_host(nodes: str) -> str:
    """Of SLURM's notation: ``n1`` of ``n[1-3,7]``, ``a`` of ``a,b[1-2]``, ``r2c1`` of ``r[2-3]c[1-4]``."""
    outside = re.sub(r"\[([^]]*)\]", lambda match: "[" + match[1].replace(",", ";") + "]", nodes)
    return re.sub(r"\[([^];-]*)[^]]*\]", r"\1", outside.split(",")[0])


def tasks_on(node: int, counts: str) -> int:
    """Of ``4(x2),3``, which says 4, 4 and 3 tasks."""
    each: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        each += [int(count)] * int(times.rstrip(")") or 1)
    return each[node]


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Of a task of srun, what torchrun would have set."""
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_on(int(environment["SLURM_NODEID"]), environment["SLURM_STEP_TASKS_PER_NODE"])),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port(int(environment["SLURM_JOB_ID"]))),
    }
