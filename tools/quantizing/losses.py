"""Losses of single windows of held-out text, so that those of a model and of its rounded self can be paired."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from models import ConfigError
from pretrain.batch import document_numbers
from pretrain.config import RunConfig
from pretrain.data import open_source
from pretrain.run import RunFolder
from tools.loading import TrainedRun

Windows = tuple[np.ndarray, np.ndarray]  # inputs and targets, both int64 [windows, length]


def read_windows(config: RunConfig, path: Path, sequences: int) -> Windows:
    """At most ``sequences`` windows of the run's validation split, spread evenly; those as training validates on.

    A last one that the text does not fill is left out, so that all have equally many targets. ConfigError if there are
    fewer than two, or if the data has another tokenizer than the run.
    """
    source = open_source(config.data, config.seed)
    tokenizer = RunFolder(path).tokenizer
    if tokenizer.is_file() and tokenizer.read_bytes() != source.tokenizer_path.read_bytes():
        raise ConfigError(f"{config.data.path} has another tokenizer than {path}: restore what it was trained on")
    held_out = source.validation
    if held_out is None:
        raise ConfigError(f"{config.data.path} has no validation split: prepare it with --validation-fraction 0.01")
    length = config.data.sequence_length
    whole = held_out.tokens // length
    if whole < 2:
        raise ConfigError(
            f"{config.data.path} has {held_out.tokens:,} tokens for validation, fewer than two windows of {length}: "
            "prepare more text"
        )
    count = min(sequences, whole)
    return held_out.read([i * whole // count for i in range(count)])


@torch.no_grad()
def window_losses(trained: TrainedRun, windows: Windows, advance: Callable[[], object]) -> list[float]:
    """The mean loss of every window in nats a token, in fp32; ``advance`` is called after each.

    One window is one forward: what is scaled by a sequence is then no matter of what else is in a batch.
    """
    model, config = trained.model, trained.config
    device = model.embedding.weight.device
    losses = []
    for inputs, targets in zip(*windows, strict=True):
        tokens = torch.from_numpy(inputs[None]).to(device)
        documents = document_numbers(tokens, trained.tokenizer.eos) if config.data.document_mask else None
        wanted = torch.from_numpy(targets[None]).to(device)
        nll = model(tokens, wanted, documents, loss_chunk=config.train.loss_chunk)[1]
        losses.append(nll.item() / len(targets))
        advance()
    return losses
