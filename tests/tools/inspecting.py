"""A model without a run, as tools.inspecting sees a trained one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from models import ModelConfig, Transformer
from pretrain.batch import Batch, document_numbers, make_batch
from pretrain.config import DataConfig, RunConfig, TrainConfig
from tools.inspecting.subject import Subject

QUIET = Progress(console=Console(quiet=True), disable=True)


def make_subject(
    sequences: int = 4,
    length: int = 24,
    documents: bool = False,
    records: list[dict[str, Any]] | None = None,
    **model: Any,
) -> Subject:
    """Two blocks of width 32 over 50 pieces, every parameter moved at random from where it starts, so that no branch
    is shut and no gain is 1; token 0 ends a document."""
    torch.manual_seed(1)
    settings = {"width": 32, "depth": 2, "heads": 4, "context": 64, "vocab_size": 50, **model}
    config = ModelConfig(**settings)
    transformer = Transformer(config).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    rows = torch.randint(50, (2 * sequences, length + 1))
    held_out = make_batch(rows[sequences:], 0, False)
    if documents:
        held_out = held_out._replace(documents=document_numbers(held_out.inputs, 0))
    run = RunConfig(
        model=config,
        data=DataConfig(sequence_length=length, document_mask=documents),
        train=TrainConfig(steps=1, batch_tokens=4 * length),
    )
    training: Batch = make_batch(rows[:sequences], 0, documents)
    return Subject("made", Path("made"), transformer, replace(run), 0, training, held_out, records or [])
