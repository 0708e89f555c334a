"""transformers' LlamaForCausalLM with its own loss. Imports nothing of ours, so that its start can be timed alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def build(
    settings: Mapping[str, Any], device: torch.device, compiled: bool
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The model that ``settings``, LlamaConfig's arguments, describe, and the mean loss of inputs and targets.

    As transformers' own Trainer runs it: attention by scaled_dot_product_attention, the whole model compiled. Without
    a cache of keys and values, which training has no use for.
    """
    logging.disable(logging.WARNING)  # torchao, which it imports, tells of CUDA libraries that it cannot load
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    finally:
        logging.disable(logging.NOTSET)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**{**settings, "use_cache": False, "attn_implementation": "sdpa"}))
    model.train()
    run: Any = torch.compile(model) if compiled else model

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        # Given labels alone the model shifts them itself, and has one target fewer than all others here.
        return run(input_ids=inputs, labels=targets, shift_labels=targets).loss

    return model, loss


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """torch's fused AdamW over all parameters, with the settings of our own LLaMA configurations."""
    return torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
