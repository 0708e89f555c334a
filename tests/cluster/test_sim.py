"""The simulated cluster, held to what launch scripts and drills rely on. Waits are upper bounds for a busy machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.cluster import slurm as module
from tests.cluster.slurm import Slurm, SlurmError, obstacle

REPOSITORY = Path(__file__).parents[2]


def script(folder: Path, *lines: str) -> Path:
    path = folder / "job.sh"
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    return path


def test_a_job_runs_on_two_hosts_that_share_files_and_reach_each_other_by_name(slurm: Slurm, tmp_path: Path) -> None:
    slurmd = "(: </dev/tcp/n1/6818) && (: </dev/tcp/n2/6818)"
    hello = f'{slurmd} && echo "$SLURM_NODEID $(hostname) $GREETING"'
    job = slurm.sbatch(
        "--nodes=2",
        "--output=out-%j",
        script(tmp_path, f"srun bash -c '{hello}'"),
        env={"GREETING": "a,b c"},
        cwd=tmp_path,
    )
    ended = slurm.until_state(job, "COMPLETED", "FAILED")
    assert ended["JobState"] == "COMPLETED"
    assert ended["NodeList"] == "n[1-2]"
    assert ended["StdOut"] == str(tmp_path / f"out-{job}")
    assert sorted((tmp_path / f"out-{job}").read_text().splitlines()) == ["0 n1 a,b c", "1 n2 a,b c"]


def test_a_requeued_job_restarts_and_counts(slurm: Slurm, tmp_path: Path) -> None:
    lines = ("echo run ${SLURM_RESTART_COUNT:-0}", '[ -n "$SLURM_RESTART_COUNT" ] || sleep 600')
    job = slurm.sbatch("--output=out", "--open-mode=append", script(tmp_path, *lines), cwd=tmp_path)
    out = tmp_path / "out"
    slurm.until("its first run speaks", lambda: out.is_file() and out.read_text() == "run 0\n", timeout=30)
    slurm.requeue(job)
    assert slurm.until_state(job, "COMPLETED", timeout=60)["Restarts"] == "1"
    assert re.findall("^run .*", out.read_text(), re.MULTILINE) == ["run 0", "run 1"]  # between them is SLURM's own


def test_one_process_of_one_node_is_killed(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.sbatch("--nodes=2", script(tmp_path, "srun --kill-on-bad-exit=1 sleep 600"), cwd=tmp_path)

    def sleeping(node: str) -> list[int]:  # srun runs a program by its path
        return [pid for pid, line in slurm.processes(node).items() if line.endswith("/sleep 600")]

    slurm.until("both nodes sleep", lambda: sleeping("n1") and sleeping("n2"), timeout=30)
    [victim] = sleeping("n2")
    slurm.signal("n2", victim, SIGKILL)
    ended = slurm.until_state(job, "COMPLETED", "FAILED")
    assert ended["JobState"] == "FAILED"
    assert "n2: task 1: Killed" in Path(ended["StdOut"]).read_text()
    assert sleeping("n1") == sleeping("n2") == []


def test_jobs_of_a_node_without_link_and_of_one_without_power_run_again_elsewhere(
    slurm4: Slurm, tmp_path: Path
) -> None:
    jobs = [slurm4.sbatch("--exclusive", script(tmp_path, "sleep 600"), cwd=tmp_path) for _ in range(2)]
    cut, dead = (slurm4.until_state(job, "RUNNING")["BatchHost"] for job in jobs)
    slurm4.fault("cut", cut)
    slurm4.fault("kill", dead)
    slurm4.until("both are down", lambda: slurm4.nodes_in("down") == sorted([cut, dead]), timeout=60)
    for job in jobs:
        again = slurm4.until_state(job, "RUNNING")
        assert again["Restarts"] == "1"
        assert again["BatchHost"] not in (cut, dead)
    assert "sleep 600" in slurm4.processes(cut).values()  # nobody could tell it to stop
    with pytest.raises(SlurmError, match=f"{dead} is off"):
        slurm4.processes(dead)
    slurm4.fault("heal", cut)
    slurm4.fault("boot", dead)
    ping = ("scontrol", "ping")  # asks the controller
    slurm4.until(
        "both are back",
        lambda: all("is UP" in slurm4.on(node, *ping, check=False) for node in (cut, dead)),
        timeout=30,
    )


def test_nothing_is_left_of_a_test(slurm: Slurm, tmp_path: Path) -> None:
    """Not even of a job that will not be cancelled and has a process outside it, on nodes that do not answer."""
    lines = ("trap 'scontrol requeue $SLURM_JOB_ID' TERM", "setsid sleep 600 &", "while :; do sleep 1; done")
    jobs = [slurm.sbatch("--exclusive", script(tmp_path, *lines), cwd=tmp_path) for _ in range(3)]
    for job in jobs[:2]:
        slurm.until_state(job, "RUNNING")
    slurm.on("ctl", "scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    slurm.fault("hang", "n1")
    slurm.fault("drop", "n2")
    slurm.restart()
    assert slurm.on("ctl", "squeue", "--noheader") == ""
    assert slurm.nodes_in("idle") == slurm.nodes
    for node in slurm.nodes:
        assert "sleep 600" not in slurm.processes(node).values()


def test_errors_say_what_slurm_said(slurm: Slurm, tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match=r"scontrol --oneliner show job 999999: exit code 1\n.*Invalid job id"):
        slurm.job("999999")
    with pytest.raises(SlurmError, match=r"sleep 5: not done after 0\.2 s"):
        slurm.on("n1", "sleep", 5, timeout=0.2)
    job = slurm.sbatch("--hold", "--output=out", script(tmp_path, "true"), cwd=tmp_path)
    with pytest.raises(SlurmError, match=rf"not within 0\.2 s: job {job} is RUNNING\n[^$]*JobHeldUser[^$]*n2 .*idle"):
        slurm.until_state(job, "RUNNING", timeout=0.2)
    (tmp_path / "out").write_text("what it printed")
    assert slurm.record()[str(tmp_path / "out")] == "what it printed"
    assert any(f"JobId={job}" in text for text in slurm.record().values())


def test_pretend_gpus_and_a_second_cluster_beside_the_first(slurm: Slurm, tmp_path: Path) -> None:
    with Slurm.start(tmp_path / "gpus", 1, gpus=8, kill_wait=7) as other:
        shown = other.on("ctl", "srun", "--gpus-per-node=8", "--cpus-per-task=16", "--mem=0", "--exclusive", "printenv")
        assert {"CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE=8"} <= set(shown.splitlines())
        assert "KillWait                = 7 sec" in other.on("ctl", "scontrol", "show", "config")
    assert slurm.on("n2", "hostname") == "n2"


def test_a_cluster_ends_with_the_process_that_started_it(slurm: Slurm, tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib; from tests.cluster.slurm import Slurm;"
        "cluster = Slurm.start(pathlib.Path(sys.argv[1]), 1); print('up', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as starter:
        try:
            assert starter.stdout is not None
            assert starter.stdout.readline() == "up\n"
            cluster = family(int((tmp_path / "run" / "init.pid").read_text()))
        finally:
            starter.kill()
    assert len(cluster) >= 5  # two first processes, slurmctld, slurmd, munged
    end = time.monotonic() + 20
    while left := [pid for pid in cluster if runs(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert slurm.on("n1", "hostname") == "n1"


def family(pid: int) -> list[int]:
    """The process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


def runs(pid: int) -> bool:
    """It is there, and not as a zombie that a machine's first process has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_keeps_a_cluster_from_running_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAMS", ("sh", "no-such-daemon"))
    assert obstacle() == "not installed: no-such-daemon; run `make cluster` as root on Debian or Ubuntu"
    monkeypatch.setattr(module, "PROGRAMS", ())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert obstacle() == "nodes are namespaces and need root; run the tests as root"


@pytest.mark.parametrize("required", ["0", "1"])
def test_without_a_cluster_tests_are_skipped_aloud_or_fail_where_one_is_required(required: str) -> None:
    test = f"{Path(__file__).relative_to(REPOSITORY)}::{test_a_requeued_job_restarts_and_counts.__name__}"
    program = (
        "import sys, pytest; from tests.cluster import slurm; slurm.PROGRAMS = ('no-such-daemon',);"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--confcutdir=tests/cluster"]  # starts sooner
    done = subprocess.run(
        [sys.executable, "-c", program, *options, test],
        cwd=REPOSITORY,
        env=os.environ | {"EQUIPOISE_REQUIRE_CLUSTER": required},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    reason = "not installed: no-such-daemon; run `make cluster` as root on Debian or Ubuntu"
    assert done.returncode == int(required)
    if required == "1":
        assert f"no cluster: {reason}" in done.stdout
    else:
        assert f"SKIPPED 1 cluster tests: {reason}\n" in done.stdout
