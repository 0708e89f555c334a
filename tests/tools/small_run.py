"""A prepared folder and a trained run, both small enough to make anew in a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import ModelConfig
from pretrain.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, RunConfig, TrainConfig
from pretrain.data.preparation import Settings, prepare
from pretrain.distributed import World
from pretrain.trainer import Outcome, Trainer

WORLD = World(0, 1, torch.device("cpu"))
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "and", "then"]


def small_text(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def prepare_small(folder: Path) -> Path:
    """Eighty documents of sixty words, a fifth of them for validation. What datasets caches stays in ``folder``."""
    source = folder / "text.jsonl"
    source.write_text("".join(f'{{"text": "{small_text(i, 60)}"}}\n' for i in range(80)))
    data = folder / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "hf"))
        prepare([str(source)], data, Settings(vocab_size=300, validation_fraction=0.2), workers=1)
    return data


def small_config(folder: Path, data: Path) -> RunConfig:
    return RunConfig(
        name="small",
        runs_dir=str(folder / "runs"),
        device="cpu",
        model=ModelConfig(width=32, depth=2, heads=2, context=32),
        data=DataConfig(path=str(data), sequence_length=32),
        train=TrainConfig(steps=4, batch_tokens=128, micro_batch=2),
        optimizer=OptimizerConfig(lr=0.1),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(tensorboard=False),
    )


def train_small(config: RunConfig) -> tuple[Trainer, Path]:
    """The trainer at the end of its run, and the run's folder."""
    trainer = Trainer(replace(config), WORLD)
    assert trainer.run() is Outcome.FINISHED
    return trainer, trainer.folder.path
