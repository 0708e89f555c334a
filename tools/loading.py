"""The trained model of a run's folder, for the tools that look at one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from models import ConfigError, Transformer
from pretrain.checkpoint import Checkpointer
from pretrain.config import RunConfig
from pretrain.data import Tokenizer
from pretrain.run import RunFolder
from tools.formats.tokenizer import FAST, HUB_FILES, FastTokenizer


class TrainedRun(NamedTuple):
    model: Transformer  # in evaluation mode, fp32
    config: RunConfig
    tokenizer: Tokenizer
    step: int


def load_run(path: Path, device: torch.device) -> TrainedRun:
    """The model of the newest whole checkpoint. ConfigError if there is no run or no checkpoint."""
    folder = RunFolder(path)
    config = folder.read_config()
    checkpointer = Checkpointer(folder.checkpoints, keep=1, keep_every=None)  # reads only
    committed = checkpointer.latest()
    if committed is None:
        raise ConfigError(f"{path} has no checkpoint yet: train it first, python -m pretrain {folder.config}")
    with torch.device("meta"):
        model = Transformer(config.model)
    model.to_empty(device="cpu")
    tensors = {"model": model.state_dict()}
    checkpointer.load(committed, tensors)
    model.load_state_dict(tensors["model"])
    return TrainedRun(model.to(device).eval(), config, load_tokenizer(folder), committed.step)


def load_tokenizer(folder: RunFolder) -> Tokenizer:
    """The sentencepiece model that the run was trained with, or else what an imported model came with."""
    imported = folder.path / HUB_FILES
    if not folder.tokenizer.is_file() and (imported / FAST).is_file():
        return FastTokenizer(imported)
    return Tokenizer(folder.tokenizer)
