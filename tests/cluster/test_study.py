"""A study on a real SLURM: tuned in one array, finished in a second that waits for it, reported by a job after both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from tests.cluster.jobs import CONFIG
from tests.cluster.slurm import Slurm
from tests.cluster.test_train import SMALL, break_, copy_of_the_checkout
from tests.runs import metrics


def test_a_study_is_two_arrays_and_a_report(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """What was submitted is what runs, although the checkout is broken meanwhile. One value diverges."""
    checkout = copy_of_the_checkout(tmp_path / "check out")
    run = {key: value for key, value in CONFIG.items() if key not in ("name", "checkpoint", "model")}
    run |= {"model": CONFIG["model"] | SMALL, "train": {"steps": 8, "batch_tokens": 256, "clip": None}}
    run |= {"data": {"path": str(corpus), "sequence_length": 64}}
    study = {
        "name": "array",
        "run": run,
        "factors": {"plan": {"dnt": {"tune": {"optimizer.lr": [0.1, 1e30]}}}},
        "tune_seeds": [0],
        "seeds": [1],
        "stop_early": {"after": 0.5, "worse_by": 5.0},
    }
    (checkout / "study.yaml").write_text(yaml.safe_dump(study))
    environment = {"LAUNCH_PYTHON": sys.executable, "LAUNCH_HEALTH": "0", "OMP_NUM_THREADS": "1"}
    printed = slurm.on(
        *("ctl", sys.executable, "-m", "tools.study", "study.yaml", "--slurm", "--nodes=1", "--hold"),
        env=environment | {"PYTHONPATH": str(checkout)},
        cwd=checkout,
    )
    assert [line.split(":")[0] for line in printed.splitlines()] == ["tuning", "final", "report"]
    for room in ("models", "pretrain", "tools", "launch"):
        break_(checkout / room)
    for job in slurm.on("ctl", "squeue", "--noheader", "--format=%A").split():
        slurm.on("ctl", "scontrol", "release", job)
    slurm.until("all jobs have ended", lambda: not slurm.on("ctl", "squeue", "--noheader"), 240)

    left = [line for node in slurm.nodes for line in slurm.processes(node).values() if "tools.studies" in line]
    assert not left, "what watches a cell ends with its job"

    folder = checkout / "runs/array"
    output = "\n".join(path.read_text() for path in folder.glob("slurm-*.out"))
    assert (folder / "report.html").exists(), output
    results = json.loads((folder / "results.json").read_text())
    assert results["cells"] == {
        "dnt-lr0.1-seed1": "finished",
        "dnt-lr0.1-seed0": "finished",
        "dnt-lr1e+30-seed0": "diverged",
    }, output
    final = folder / "dnt-lr0.1-seed1"
    assert results["arms"][0]["seeds"] == {"1": metrics(final)[-1]["val_loss"]}
    (launch,) = (final / "launches").iterdir()
    assert json.loads((launch / "launch.json").read_text())["code"].startswith("runs/array/dnt-lr0.1-seed1/frozen/")
