"""Studies whose runs are written down instead of trained: what they found is then known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain.cli import dump
from tests.runs import TINY
from tools.studies.grid import Cell, Study, read_study

ENVIRONMENT = {
    "command": ["python"],
    "python": "3.11",
    "packages": {"torch": "2.13"},
    "git_revision": "abc",
    "git_changes": False,
    "host": "h",
}


def tree(**changes: Any) -> dict[str, Any]:
    """Two plans, each with two rates to try, tuned under seed 0 and reported under three others: 4 and 6 cells."""
    run = {key: value for key, value in TINY.items() if key != "name"}
    run["train"] = {"steps": 20, "batch_tokens": 64}
    run["schedule"] = {"warmup_steps": 0}
    return {
        "name": "small",
        "run": run,
        "factors": {
            "plan": {"llama": {"model": {"plan": "llama"}}, "dnt": {"model": {"plan": "dnt"}}},
            "rate": {"tuned": {"tune": {"optimizer.lr": [0.01, 0.1, 1.0]}}},
        },
        "tune_seeds": [0],
        "seeds": [1, 2, 3],
    } | changes


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return path


def study(folder: Path, **changes: Any) -> Study:
    return read_study(write(folder, tree(**changes)))


def ran(
    cell: Cell,
    loss: float | None,
    *,
    code: int = 0,
    text: str = "",
    curve: Sequence[float] | None = None,
    **environment: Any,
) -> None:
    """As if ``cell`` had been trained to ``loss``; None: its code is 3, it diverged. ``curve``: training losses from
    step 1 on, by default from 6 down to ``loss``."""
    code = 3 if loss is None else code
    steps = cell.config.train.steps
    assert steps is not None
    last = 6.0 if loss is None else loss
    losses = [6.0 + (last - 6.0) * step / steps for step in range(1, steps + 1)] if curve is None else curve
    records: list[dict[str, Any]] = [
        {
            "step": step,
            "tokens": step * cell.config.train.batch_tokens,
            "loss": value,
            "tokens_per_second": 1000.0 + step,
            "memory_gb": 0.5,
        }
        for step, value in enumerate(losses, start=1)
    ]
    if code == 0:
        records[-1] |= {"val_loss": loss, "val_bits_per_byte": last / 2}
    launch = cell.folder / "launches/here"
    launch.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(cell.config, model=dataclasses.replace(cell.config.model, vocab_size=512))
    (cell.folder / "config.yaml").write_text(dump(config))
    (cell.folder / "environment.json").write_text(json.dumps(ENVIRONMENT | environment))
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = text or ("at step 3 the loss is nan and the gradient norm nan: lower" if code == 3 else "finished")
    (launch / "outcome.json").write_text(json.dumps({"code": code, "text": text}))
