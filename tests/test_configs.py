"""Every run configuration under configs/ loads, resolves, builds (on the meta device) and divides its batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from models import PLANS, Transformer
from models.plan import resolve_plan
from pretrain.cli import dump, load
from pretrain.counts import derive_counts

CONFIGS = Path(__file__).parents[1] / "configs"
# A study holds many runs, in tools.study's own format.
FILES = sorted(
    n for n in (str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml")) if not n.startswith("studies/")
)


def test_there_are_files() -> None:
    assert "tiny.yaml" in FILES
    assert len([name for name in FILES if name.startswith("models/")]) >= 8


@pytest.mark.parametrize("name", FILES)
def test_it_builds_and_its_counts_derive(name: str) -> None:
    config = load(CONFIGS / name)
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 4096)
    resolve_plan(model)
    with torch.device("meta"):
        Transformer(model)
    for world_size in (1, 2, 4, 8):
        counts = derive_counts(config, world_size)
        assert counts.batch_tokens == config.train.batch_tokens
        assert config.schedule.warmup_steps < counts.steps


@pytest.mark.parametrize("name", FILES)
def test_written_out_it_is_the_same(name: str, tmp_path: Path) -> None:
    """A run's folder holds the resolved configuration; it must start the same run from anywhere."""
    config = load(CONFIGS / name)
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("models/")])
def test_every_plan_is_one_override_away(name: str) -> None:
    for plan in PLANS:
        config = load(CONFIGS / name, ["--model.plan", plan])
        resolve_plan(config.model)
        assert config.name == Path(name).stem
