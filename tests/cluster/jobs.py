"""A run that the repository's own scripts start on a cluster, as a test or a drill sees it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import yaml

from launch.launches import Launch, committed_step, launches_of
from tests.cluster.slurm import Slurm
from tests.runs import REPOSITORY, checkpoint_tensors, curve

# 3.4 million parameters: a step takes a tenth of a second on two ranks, a checkpoint is 27 MB, and so lasts.
CONFIG: dict[str, Any] = {
    "name": "drill",
    "model": {"plan": "dnt", "width": 256, "depth": 4, "heads": 4, "context": 64},
    "data": {"sequence_length": 64},
    "train": {"steps": 40, "batch_tokens": 512, "micro_batch": 2},
    "optimizer": {"name": "msgdw", "lr": 0.1},
    "schedule": {"warmup_steps": 4},
    "checkpoint": {"every": 8},
    "validate": {"every": 10, "sequences": 40},
    "log": {"every": 5, "tensorboard": False},
    "parallel": {"silence": 5.0, "timeout": 60.0},
    "device": "cpu",
}


def configuration(folder: Path, data: Path, **more: Any) -> Path:
    """CONFIG with runs in ``folder``, sections and keys of ``more`` over it."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in CONFIG.items()}
    for key, value in more.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    tree |= {"runs_dir": str(folder / "runs")}
    tree["data"] |= {"path": str(data)}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@dataclass(frozen=True)
class Job:
    """A job of ``train.sbatch``, and the run that it trains."""

    slurm: Slurm
    number: str
    run: Path

    @classmethod
    def submit(
        cls,
        slurm: Slurm,
        config: Path,
        *options: object,
        overrides: tuple[str, ...] = (),
        checkout: Path = REPOSITORY,
        env: Mapping[str, str] | None = None,
    ) -> Self:
        """On two nodes, one rank each, unless ``options`` of sbatch say otherwise; without a health check."""
        tree = yaml.safe_load(config.read_text())
        environment = {"LAUNCH_HEALTH": "0", "LAUNCH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1"} | dict(env or {})
        output = f"--output={config.parent}/{config.stem}-%j.out"
        script = [checkout / "launch/train.sbatch", config, *overrides]
        number = slurm.sbatch("--nodes=2", output, *options, *script, env=environment, cwd=checkout)
        return cls(slurm, number, Path(tree["runs_dir"]) / tree["name"])

    @property
    def record(self) -> dict[str, str]:
        return self.slurm.job(self.number)

    @property
    def state(self) -> str:
        return self.record["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.record["Restarts"])

    @property
    def output(self) -> str:
        path = Path(self.record["StdOut"])
        return path.read_text() if path.exists() else ""

    @property
    def launches(self) -> list[Launch]:
        return [launch for launch in launches_of(self.run) if launch.job == self.number]

    @property
    def committed(self) -> int:
        return committed_step(self.run)

    def printed(self, restart: int) -> str:
        """What the first rank of that launch has printed so far."""
        logs = sorted(self.run.glob(f"launches/{self.number}.{restart}/ranks/n*/*/attempt_0/0/stderr.log"))
        return "".join(log.read_text() for log in logs)

    def steps(self, restart: int) -> list[int]:
        """Of the lines of that launch, one for each time that something was said of a step."""
        return [int(step) for step in re.findall(r"^step (\d+)/", self.printed(restart), re.MULTILINE)]

    def until_step(self, step: int, restart: int = 0, timeout: float = 90) -> None:
        self.slurm.until(
            f"step {step} of {self.run} in launch {restart}",
            lambda: max(self.steps(restart), default=0) >= step,
            timeout,
        )

    def until_running(self, restart: int, timeout: float = 60) -> None:
        self.slurm.until(
            f"job {self.number} runs for the {restart + 1}. time",
            lambda: (self.restarts, self.state) == (restart, "RUNNING"),
            timeout,
        )

    def until_ended(self, timeout: float = 120) -> str:
        """The state that the job ended in, for good."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        return self.slurm.until_state(self.number, *ends, timeout=timeout)["JobState"]

    def processes(self, node: str, of: str) -> list[int]:
        """Pids on ``node`` of this run's ``ranks``, or of the ``agent`` that started them."""
        mark = {"ranks": "-m pretrain", "agent": "-m launch node"}[of]
        lines = self.slurm.processes(node).items()
        return [pid for pid, line in lines if mark in line and "python" in line.split()[0]]


def same(one: Path, other: Path) -> None:
    """Two runs ended alike, bit for bit: weights, optimizer state and the whole curve."""
    steps = committed_step(one)
    assert steps == committed_step(other)
    first, second = (checkpoint_tensors(run / f"checkpoints/step-{steps:08d}") for run in (one, other))
    assert first.keys() == second.keys()
    different = [
        name
        for name, value in first.items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, second[name])
    ]
    assert not different, different
    assert curve(one) == curve(other)
