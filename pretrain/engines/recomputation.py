"""Activation checkpointing: what the backward computes again instead of keeping it (arXiv 1604.06174).

A block's ``forward`` is replaced, not the block: parameter names stay the model's own, and FSDP and torch.compile see
the same modules as without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.errors import ConfigError
from pretrain.config import TrainConfig

aten = torch.ops.aten

# What selective checkpointing keeps: operations that cost much and whose results are small beside it. Norms, DyT,
# activation functions, rotary positions and additions are computed again.
_KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(blocks: nn.ModuleList, train: TrainConfig) -> None:
    """Make the blocks that ``train`` says recompute themselves in the backward. Before compilation and sharding."""
    every = train.checkpoint_every_block
    if every is not None and (every < 1 or train.activation_checkpointing != "selective"):
        raise ConfigError(
            f"train.checkpoint_every_block is {every} with train.activation_checkpointing "
            f"{train.activation_checkpointing}: write a positive number with selective, or null"
        )
    if train.activation_checkpointing == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if train.activation_checkpointing == "selective" and every is None:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for index, block in enumerate(blocks):
        if index % (every or 1) == 0:
            block.forward = _recomputing(block.forward, settings)


def _recomputing(forward: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    def recomputing(*args: Any) -> Any:  # a function of our own, where torch.compile begins to trace
        return checkpoint(forward, *args, **settings)

    return recomputing
