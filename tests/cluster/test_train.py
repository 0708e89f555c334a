"""train.sbatch and submit.sh on a real SLURM: what a user of a cluster does, and does wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.jobs import Job, configuration
from tests.cluster.slurm import Slurm
from tests.runs import REPOSITORY, metrics

SMALL = {"width": 32, "depth": 2, "heads": 2}


def copy_of_the_checkout(folder: Path) -> Path:
    """One that a test may break."""
    for room in ("models", "pretrain", "tools", "launch"):
        shutil.copytree(REPOSITORY / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def break_(checkout: Path) -> None:
    """No code of it can be imported any more, and its scripts only fail."""
    for path in [*checkout.rglob("__init__.py"), *checkout.glob("launch/*")]:
        path.write_text("exit 9 !\n")


def submit_sh(slurm: Slurm, checkout: Path, *arguments: object, **environment: str) -> str:
    """The job's number."""
    environment = {"LAUNCH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LAUNCH_HEALTH": "0"} | environment
    printed = slurm.on("ctl", "bash", checkout / "launch/submit.sh", *arguments, env=environment, cwd=checkout)
    return printed.removeprefix("Submitted batch job ")


def test_what_was_submitted_is_what_runs(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """Frozen at submission, with a name that no unquoted word survives, healthy on both nodes."""
    checkout = copy_of_the_checkout(tmp_path / "check out")
    config = configuration(tmp_path, corpus, name='it\'s $HOME; a "name"', model=SMALL, train={"steps": 12})
    number = submit_sh(slurm, checkout, "--hold", "--nodes=2", "--", config, "--log.every", "3", LAUNCH_HEALTH="1")
    break_(checkout)
    slurm.on("ctl", "scontrol", "release", number)
    job = Job(slurm, number, tmp_path / "runs" / yaml.safe_load(config.read_text())["name"])
    assert job.until_ended() == "COMPLETED", job.output
    assert "healthy: 2 ranks on 2 hosts" in job.output
    assert "finished: step 12, val_loss" in job.output
    assert "world size 2" in job.output
    assert [line["step"] for line in metrics(job.run)][:2] == [3, 6], "the override counts"
    assert job.record["JobName"] == job.run.name
    assert json.loads((job.run / "environment.json").read_text())["world_size"] == 2


def test_a_requeued_job_runs_the_code_that_it_began_with(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    checkout = copy_of_the_checkout(tmp_path / "checkout")
    config = configuration(tmp_path, corpus, train={"steps": 60})
    job = Job.submit(slurm, config, checkout=checkout)
    job.until_step(15)
    break_(checkout)
    slurm.requeue(job.number)
    assert job.until_ended() == "COMPLETED", job.output
    assert job.restarts == 1
    assert "going on after step" in job.printed(1)
    assert not list(checkout.glob(".launch/*")), "what is only needed while the job may come back"


def test_a_second_job_of_a_run_refuses(slurm4: Slurm, corpus: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, corpus, train={"steps": 2000})
    first = Job.submit(slurm4, config)
    first.until_step(5)
    second = Job.submit(slurm4, config)
    assert second.until_ended() == "FAILED"
    assert second.record["ExitCode"] == "2:0"
    assert f"another process trains {first.run} (host n1, process" in second.output
    assert f"SLURM job {first.number}, since" in second.output
    assert second.restarts == 0, "a mistake is not requeued"
    status = slurm4.on("ctl", sys.executable, "-m", "launch", "status", first.run, cwd=REPOSITORY)
    assert "state      running\n" in status
    assert f"job        {first.number} RUNNING" in status
    (first.run / "stop").touch()
    assert first.until_ended() == "FAILED"
    assert first.record["ExitCode"] == "75:0"
    assert first.restarts == 0, "whoever stops it by hand does not want it back"
    stopped = first.launches[0].outcome
    assert stopped is not None
    assert first.committed == stopped["step"] > 5


def test_a_mistake_ends_a_job(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, corpus, model=SMALL)
    wrong_key = Job.submit(slurm, config, "--nodes=1", overrides=("--model.widht", "3"))
    assert wrong_key.until_ended() == "FAILED"
    assert wrong_key.record["ExitCode"] == "2:0"
    assert "there is no key 'model.widht'; did you mean 'model.width'?" in wrong_key.output
    no_data = Job.submit(slurm, config, "--nodes=1", overrides=("--data.path", str(tmp_path / "nothing")))
    assert no_data.until_ended() == "FAILED"
    assert no_data.record["ExitCode"] == "2:0"
    assert no_data.restarts == 0
    assert "Traceback" not in no_data.output


def test_a_job_that_only_crashes_is_given_up(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """Python works on the batch host, and no node can start a rank."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"launch node"*) exit 9;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    config = configuration(tmp_path, corpus, model=SMALL)
    job = Job.submit(slurm, config, env={"LAUNCH_PYTHON": str(python), "LAUNCH_MAX_FAILURES": "2"})
    assert job.until_ended() == "FAILED", job.output
    assert job.restarts == 1
    assert "so did 2 launches in a row, without a new checkpoint" in job.output


@pytest.mark.drill
def test_fewer_nodes_after_one_is_lost(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, corpus, train={"steps": 120}, validate={"every": 0})
    job = Job.submit(slurm, config, "--nodes=1-2")
    job.until_step(20)
    slurm.fault("kill", "n2")
    assert job.until_ended(timeout=150) == "COMPLETED", job.output
    assert [launch.nodes for launch in job.launches] == [["n1", "n2"], ["n1"]]
    assert "world size 1" in job.printed(1)
    assert len({line["batch_hash"] for line in metrics(job.run) if "batch_hash" in line}) > 20


def test_srun_starts_ranks_by_itself(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, corpus, model=SMALL, train={"steps": 4})
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "pretrain", config]
    printed = slurm.on("ctl", *command, cwd=REPOSITORY, env={"OMP_NUM_THREADS": "1"}, timeout=120)
    assert printed.startswith("finished: step 4, val_loss")
    assert json.loads((tmp_path / "runs/drill/environment.json").read_text())["world_size"] == 2
