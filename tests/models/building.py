"""Small models for the tests of models/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models import ModelConfig, Transformer
from models.initialization import initialize

VOCABULARY = 61  # odd, so that nothing can lean on alignment


def tiny(**changes: Any) -> ModelConfig:
    sizes = {"width": 32, "depth": 2, "heads": 4, "ffn_width": 40, "vocab_size": VOCABULARY, "context": 16}
    return ModelConfig(**(sizes | changes))


def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model as training starts it."""
    model = Transformer(config)
    initialize(model, config, seed)
    return model.to(dtype)


def scrambled(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose every parameter is random: no gain of 1, no shift of 0, no two sites that could be swapped."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter.shape[1] if parameter.ndim == 2 else 4
            drawn = torch.randn(parameter.shape, generator=generator) / fan**0.5
            parameter.copy_(drawn if parameter.ndim == 2 else 1 + drawn)
    return model.to(dtype)


def tokens(batch: int = 2, length: int = 16, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
