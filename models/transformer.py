"""The one transformer. Its norms are data (plan.py), its sizes are data (config.py); llama and gpt are its trunks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, document_mask, rotary_table
from models.config import ModelConfig
from models.feedforward import FeedForward
from models.loss import cross_entropy_sum
from models.plan import NormPlan, resolve_plan
from models.roles import Role


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class Block(nn.Module):
    """``x + attn_out(attention(attn_in(x)))``, then ``x + mlp_out(feedforward(mlp_in(x)))``."""

    def __init__(self, config: ModelConfig, plan: NormPlan) -> None:
        super().__init__()
        self.attn_in = plan.build("attn_in", config.width, config)
        self.attention = Attention(config, plan)
        self.attn_out = plan.build("attn_out", config.width, config)
        self.mlp_in = plan.build("mlp_in", config.width, config)
        self.feedforward = FeedForward(config, plan)
        self.mlp_out = plan.build("mlp_out", config.width, config)
        self.dropout = config.dropout

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Any) -> Tensor:
        a = self.attention(_through(self.attn_in, x), rotary, mask)
        x = x + self._drop(_through(self.attn_out, a))
        m = self.feedforward(_through(self.mlp_in, x))
        return x + self._drop(_through(self.mlp_out, m))


class Transformer(nn.Module):
    """Tokens -> logits, or tokens and targets -> summed loss."""

    roles: ClassVar[dict[str, Role]] = {"embedding_scale": "scale", "head.weight": "head"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        plan = resolve_plan(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.trunk == "gpt" else None
        self.embedding_scale = nn.Parameter(torch.ones(1)) if plan.embedding_scale else None
        self.embed = plan.build("embed", config.width, config)
        self.blocks = nn.ModuleList(Block(config, plan) for _ in range(config.depth))
        self.final = plan.build("final", config.width, config)
        # A tied head has no parameter of its own, so no tool can see the shared weight twice.
        self.head = None if config.is_tied else nn.Linear(config.width, config.vocabulary, bias=False)

    def _embed(self, tokens: Tensor) -> Tensor:
        """fp32 up to and including the embed norm, then the compute dtype, which is also the residual stream's."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        x = _through(self.embed, x)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        config = self.config
        return F.dropout(x, config.dropout, self.training) if config.dropout else x

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        z_loss: float = 0.0,
        loss_chunk: int = 2048,
    ) -> Any:
        """``tokens``, ``targets`` (``IGNORE`` for none) and ``documents`` (numbers that confine attention) are int64
        [batch, length]. Without targets: logits [batch, length, vocabulary]. With them: (objective, negative
        log-likelihood), fp32 scalars summed over the targets (loss.py)."""
        config = self.config
        length = tokens.shape[1]
        assert length <= config.context, f"{length} tokens exceed the context of {config.context}"
        x = self._embed(tokens)
        rotary = None
        if config.trunk == "llama":
            rotary = rotary_table(length, config.head_width, config.rope_theta, tokens.device)
        mask = document_mask(documents)
        for block in self.blocks:
            x = block(x, rotary, mask)
        x = _through(self.final, x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if targets is None:
            return F.linear(x, weight)
        return cross_entropy_sum(x.flatten(0, 1), weight, targets.flatten(), z_loss, loss_chunk)
