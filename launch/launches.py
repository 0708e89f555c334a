"""The launches of a run: one folder for each time that it was started, ``runs/NAME/launches/ID``.

- ``launch.json``: when, where, by which job, from which code, after which checkpoint
- ``health.json``: what the health check measured and found
- ``stop``: made by whoever wants this launch to stop, the batch script or a node's agent
- ``outcome.json``: how it ended, by the run itself; none if it was killed or crashed
- ``errors.txt``: why it crashed, a line for each rank or node that noticed
- ``ranks/HOST/``, ``health/HOST/``: what every rank printed
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.launched import ERRORS, OUTCOME, STOP

LAUNCHES = "launches"
HEALTH = "health.json"


@dataclass(frozen=True)
class Launch:
    """One start of a run. ``arguments``: what python -m pretrain gets. ``job`` is SLURM's number and ``restart`` how
    often it was requeued before; both None on one machine. ``step``: of the last committed checkpoint when it began, 0
    for none."""

    run: str
    arguments: list[str]
    code: str
    began: float  # seconds since the epoch
    step: int
    nodes: list[str]
    job: str | None = None
    restart: int | None = None

    @property
    def identity(self) -> str:
        if self.job is not None:
            return f"{self.job}.{self.restart}"
        return time.strftime("local-%Y%m%d-%H%M%S", time.localtime(self.began)) + f".{self.began % 1 * 1000:03.0f}"

    @property
    def folder(self) -> Path:
        return Path(self.run) / LAUNCHES / self.identity

    def create(self) -> Path:
        """Write it down; the folder of a launch that is there already is a mistake of the caller's."""
        self.folder.mkdir(parents=True)
        (self.folder / "launch.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return self.folder

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What the run itself said at its end: at least ``code`` and ``text``."""
        try:
            return dict(json.loads((self.folder / OUTCOME).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    @property
    def errors(self) -> list[str]:
        """Why it crashed, as far as anybody knew: what the health check found, then what ranks and nodes noticed."""
        try:
            found = json.loads((self.folder / HEALTH).read_text(encoding="utf-8"))["findings"]
        except FileNotFoundError:
            found = []
        noticed = self.folder / ERRORS
        lines = noticed.read_text(encoding="utf-8").splitlines() if noticed.exists() else []
        return [f"unhealthy: {one['text']}" for one in found if one["fails"]] + lines

    def ask_to_stop(self, reason: str) -> None:
        (self.folder / STOP).write_text(f"{reason}\n", encoding="utf-8")


def read(folder: Path) -> Launch:
    """The launch whose folder this is."""
    return Launch(**json.loads((folder / "launch.json").read_text(encoding="utf-8")))


def launches_of(run: Path) -> list[Launch]:
    """All of a run's, the first one first."""
    return sorted((read(path.parent) for path in run.glob(f"{LAUNCHES}/*/launch.json")), key=lambda one: one.began)


def committed_step(run: Path) -> int:
    """Of the newest committed checkpoint; 0 if there is none."""
    steps = [int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*") if path.is_dir()]
    return max(steps, default=0)
