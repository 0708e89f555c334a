"""A rank's place as srun leaves it in the environment, held against SLURM's own reading of its notations."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import rank
from tests.runs import REPOSITORY

TASK = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "n[001-002,7]",
    "SLURM_JOB_ID": "4711",
}
PLACE = {
    "RANK": "9",
    "WORLD_SIZE": "11",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "3",
    "MASTER_ADDR": "n001",
    "MASTER_PORT": str(20_000 + 2 * 4711),
}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of one task of many, and of no torchrun."""
    for name in [*PLACE, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_what_torchrun_would_have_set(task: pytest.MonkeyPatch) -> None:
    assert rank.adopted() == rank.variables(TASK) == PLACE
    assert rank.rank_in_environment() == 9


def test_torchrun_s_own_win(task: pytest.MonkeyPatch) -> None:
    """srun starts one torchrun on each node, which starts the ranks."""
    task.setenv("RANK", "3")
    assert rank.adopted() == {}
    assert rank.rank_in_environment() == 3


def test_one_task_is_alone(task: pytest.MonkeyPatch) -> None:
    task.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert (rank.adopted(), rank.rank_in_environment()) == ({}, 0)
    task.delenv("SLURM_STEP_NUM_TASKS")  # a batch script outside any step
    assert (rank.adopted(), rank.rank_in_environment()) == ({}, 0)


@pytest.mark.parametrize(
    ("counts", "tasks"),
    [("8", [8]), ("4(x2),3", [4, 4, 3]), ("1,2(x3),1(x1)", [1, 2, 2, 2, 1]), ("16(x100)", [16] * 100)],
)
def test_tasks_of_each_node(counts: str, tasks: list[int]) -> None:
    assert [rank.tasks_on(node, counts) for node in range(len(tasks))] == tasks
    with pytest.raises(IndexError):
        rank.tasks_on(len(tasks), counts)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("a,b,c", "a"),
        ("n[001-004,7],m1", "n001"),
        ("a,b[1-2]", "a"),
        ("n[7,1-3]", "n7"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("gpu-a[09-11],gpu-b[1]", "gpu-a09"),
        ("n[1-2]x[07]", "n1x07"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert rank.first_host(nodes) == first


ranges = st.tuples(st.integers(0, 120), st.integers(0, 5), st.integers(1, 4)).map(
    lambda r: f"{r[0]:0{r[2]}d}" if r[1] == 0 else f"{r[0]:0{r[2]}d}-{r[0] + r[1]:0{r[2]}d}"
)
bracket = st.lists(ranges, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
prefix = st.from_regex(r"[a-z]([a-z0-9-]{0,4}[a-z])?", fullmatch=True)
host = st.one_of(
    prefix, st.tuples(prefix, bracket).map("".join), st.tuples(prefix, bracket, prefix, bracket).map("".join)
)
hosts = st.lists(host, min_size=1, max_size=3).map(",".join)


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="scontrol is not installed; run `make cluster`")
def test_first_host_as_slurm_reads_it(tmp_path: Path) -> None:
    """Lists drawn at random; `scontrol show hostnames` asks no server, but wants a slurm.conf."""
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    read = 0

    @settings(max_examples=60)
    @given(hosts)
    def check(nodes: str) -> None:
        nonlocal read
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            env=os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        if done.returncode == 0 and done.stdout and "Invalid" not in done.stdout + done.stderr:
            read += 1
            assert rank.first_host(nodes) == done.stdout.split()[0]

    check()
    assert read > 20, "SLURM took nearly none of the lists: this compares nothing"


@given(st.integers(0, 2**32 - 1))
def test_ports_of_a_job(job: int) -> None:
    """Two of its own, which Linux hands out to nobody; neighbours do not share them."""
    assert rank.port(job) in rank.PORTS
    assert rank.port(job) + 1 in rank.PORTS
    assert {rank.port(job), rank.port(job) + 1}.isdisjoint({rank.port(job + 1), rank.port(job + 1) + 1})


def test_the_batch_script_has_the_same_port() -> None:
    script = (REPOSITORY / "launch" / "train.sbatch").read_text()
    [line] = re.findall(r"^port=.*$", script, re.MULTILINE)
    jobs = [0, 1, 2, 4711, 4999, 5000, 5001, 67108863, 2**32 - 2]
    program = f'for SLURM_JOB_ID in "$@"; do {line}; echo "$port"; done'
    done = subprocess.run(["bash", "-euc", program, "-", *map(str, jobs)], capture_output=True, text=True, check=True)
    assert [int(port) for port in done.stdout.split()] == [rank.port(job) for job in jobs]
