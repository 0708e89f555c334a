"""Where a run stands: ``python -m launch status RUN [--json]``, from its folder, and from SLURM if that is there.

To steer a run, with or without SLURM: ``touch RUN/save`` has a checkpoint committed within a few steps, ``touch
RUN/stop`` has one committed and the run ended, until it is started again. The file goes when that is done.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.launches import Launch, committed_step, launches_of
from models.errors import ConfigError, nearest
from pretrain.arguments import Parser
from pretrain.control import SAVE_FILE, STOP_FILE
from pretrain.counts import derive_counts
from pretrain.lock import Owner, beating, newest
from pretrain.run import RunFolder

_SHOWN = ("loss", "val_loss", "val_bits_per_byte", "tokens_per_second", "mfu")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m launch status", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, runs/NAME")
    parser.add_argument("--json", action="store_true", help="the same for a program")
    given = parser.parse_args(arguments)
    if not given.run.is_dir():
        beside = [str(path) for path in given.run.parent.glob("*/")] if given.run.parent.is_dir() else []
        raise ConfigError(f"no run's folder {given.run}" + (f"; {nearest(str(given.run), beside)}" if beside else ""))
    state = status(given.run)
    print(json.dumps(state, indent=2) if given.json else table(state))
    return 0


def status(run: Path) -> dict[str, Any]:
    """Everything that ``table`` shows; null is what the folder does not tell. Times are seconds since the epoch."""
    folder = RunFolder(run)
    config = folder.read_config() if folder.config.exists() else None
    records = folder.records()
    values: dict[str, Any] = {}
    for record in records:
        values |= {key: record[key] for key in _SHOWN if record.get(key) is not None}
    step = records[-1]["step"] if records else 0
    committed = committed_step(run)
    launches = launches_of(run)
    owner = newest(run / "owner")[1]
    # A later launch may be one that was refused because the owner's trains.
    owned = [one for one in launches if owner is not None and owner.job is not None and one.job == owner.job]
    last = next(reversed(owned or launches), None)
    steps = None if config is None else derive_counts(config, 1).steps
    return {
        "run": str(run),
        "state": _state(owner, run, last, committed == steps),
        "step": step,
        "steps": steps,
        **{key: values.get(key) for key in _SHOWN},
        "logged": folder.metrics.stat().st_mtime if records else None,
        "committed": committed or None,
        "committed_at": _time(run / "checkpoints" / f"step-{committed:08d}"),
        "owner": None if owner is None else str(owner),
        "job": None if last is None or last.job is None else f"{last.job} {job_state(last.job)}",
        "nodes": [] if last is None else last.nodes,
        "launches": len(launches),
        "requeued": 0 if last is None else last.restart or 0,
        "last_word": None if last is None or last.outcome is None else last.outcome["text"],
        "log": None if last is None else _log(last),
        "asked": [name for name in (STOP_FILE, SAVE_FILE) if (run / name).exists()],
    }


def _state(owner: Owner | None, run: Path, last: Launch | None, finished: bool) -> str:
    if owner is not None and not owner.released and beating(run / "owner"):
        return "running"
    if finished:
        return "finished"
    if owner is None:
        return "not started"
    if not owner.released:
        return "dead: killed, or crashed; start it again to go on"
    return "stopped" if last is None or last.outcome is None else "ended"


def job_state(job: str) -> str:
    """As SLURM has it now; a question mark where no SLURM is, or where it does not know the job any more."""
    if shutil.which("squeue") is None:
        return "?"
    command = ["squeue", "--noheader", "--jobs", job, "--format=%T %R"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip() or "?"
    except subprocess.TimeoutExpired:
        return "?"


def _time(path: Path) -> float | None:
    return path.stat().st_mtime if path.exists() else None


def _log(launch: Launch) -> str | None:
    """What the first rank printed."""
    host = launch.nodes[0] if launch.nodes else "*"
    logs = sorted(launch.folder.glob(f"ranks/{host}/*/attempt_0/0/stderr.log"))
    return str(logs[-1]) if logs else None


def table(state: dict[str, Any]) -> str:
    """For a person, one line for each thing that is known."""
    job, requeued = state["job"], state["requeued"]
    lines = {
        "run": state["run"],
        "state": state["state"] + (f", {' and '.join(state['asked'])} asked for" if state["asked"] else ""),
        "step": f"{state['step']} of {state['steps'] or '?'}{_ago(state['logged'])}",
        "loss": _values(state),
        "speed": state["tokens_per_second"] and f"{state['tokens_per_second']:,.0f} tokens/s",
        "checkpoint": state["committed"] and f"step {state['committed']}{_ago(state['committed_at'])}",
        "job": job and f"{job}, requeued {requeued} times, on {' '.join(state['nodes'])}",
        "launches": state["launches"],
        "owner": state["owner"],
        "last word": state["last_word"],
        "log": state["log"],
    }
    return "\n".join(f"{name:11}{text}" for name, text in lines.items() if text)


def _values(state: dict[str, Any]) -> str:
    texts = {"loss": "{:.4f}", "val_loss": "validation {:.4f}", "val_bits_per_byte": "{:.3f} bits/byte"}
    return ", ".join(text.format(state[key]) for key, text in texts.items() if state[key] is not None)


def _ago(when: float | None) -> str:
    return "" if when is None else f", {timedelta(seconds=round(max(0.0, time.time() - when)))} ago"
