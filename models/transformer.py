"""The one transformer. Its norms are data (plan.py), its sizes are data (config.py); llama and gpt are its trunks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, KeyValues, document_mask
from models.config import ModelConfig
from models.feedforward import FeedForward
from models.loss import cross_entropy_sum
from models.plan import NormPlan, resolve_plan
from models.residual import build_residual, join_fused
from models.roles import Role
from models.rotary import rotary_table


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class Block(nn.Module):
    """``x = attn_post(x + attn_out(attention(attn_in(x))))``, then ``mlp_post(x + mlp_out(feedforward(mlp_in(x))))``,
    where residual.py may have other sums."""

    fused = False

    def __init__(self, config: ModelConfig, plan: NormPlan, index: int) -> None:
        super().__init__()
        self.attn_in = plan.build("attn_in", config.width, config)
        self.attention = Attention(config, plan)
        self.attn_out = plan.build("attn_out", config.width, config)
        self.attn_post = plan.build("attn_post", config.width, config)
        self.mlp_in = plan.build("mlp_in", config.width, config)
        self.feedforward = FeedForward(config, plan)
        self.mlp_out = plan.build("mlp_out", config.width, config)
        self.mlp_post = plan.build("mlp_post", config.width, config)
        self.residual = build_residual(plan.residual, config, index)
        self.dropout = config.dropout

    @property
    def _has_plain_joints(self) -> bool:
        return self.residual is None and self.attn_post is None and self.mlp_post is None and not self.dropout

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _enter(self, x: Tensor, branch: int) -> Tensor:
        return x if self.residual is None else self.residual.enter(x, branch)

    def _join(self, x: Tensor, y: Tensor, branch: int) -> Tensor:
        return x + y if self.residual is None else self.residual(x, y, branch)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Any, seen: KeyValues | None = None
    ) -> Tensor:
        a = self.attention(_through(self.attn_in, self._enter(x, 0)), rotary, mask, seen)
        if self.fused and self._has_plain_joints:
            x, m = join_fused(x, a, self.attn_out, self.mlp_in)
            return join_fused(x, self.feedforward(m), self.mlp_out, None)[0]
        x = self._join(x, self._drop(_through(self.attn_out, a)), 0)
        x = _through(self.attn_post, x)
        m = self.feedforward(_through(self.mlp_in, self._enter(x, 1)))
        x = self._join(x, self._drop(_through(self.mlp_out, m)), 1)
        return _through(self.mlp_post, x)


class Cache:
    """What a model keeps of the tokens it has seen, so that one more token costs the work of one.

    ``padding`` int64 [batch] says how many first places of each row hold no token: rows of different lengths end
    together.
    """

    def __init__(self, config: ModelConfig, padding: Tensor, capacity: int) -> None:
        assert capacity <= config.context, f"{capacity} tokens exceed the context of {config.context}"
        self.capacity = capacity
        self.padding = padding
        self.blocks = [KeyValues(capacity) for _ in range(config.depth)]
        self.rotary: tuple[Tensor, Tensor] | None = None
        if config.trunk == "llama":
            self.rotary = rotary_table(capacity, config.head_width, config.rope_theta, padding.device)

    @property
    def full(self) -> bool:
        return self.blocks[0].length == self.capacity

    def next_places(self, count: int) -> tuple[Tensor, Tensor]:
        """Of the next ``count`` places: their positions, int64 [batch, count], counted from each row's first token, and
        what they see of all places so far, bool [batch, 1, count, places]."""
        begin = self.blocks[0].length
        assert begin + count <= self.capacity, f"{begin + count} tokens exceed a cache for {self.capacity}"
        places = torch.arange(begin + count, device=self.padding.device)
        own = places[begin:, None]
        padding = self.padding[:, None]
        # a place without a token sees itself alone: a softmax over nothing may be NaN, and 0 * NaN reaches the others
        visible = (places <= own) & ((places >= padding)[:, None] | (places == own))
        return (places[begin:] - padding).clamp(min=0), visible[:, None]


class Transformer(nn.Module):
    """Tokens -> logits, or tokens and targets -> summed loss."""

    roles: ClassVar[dict[str, Role]] = {"embedding_scale": "scale", "head.weight": "head"}
    fused = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        plan = resolve_plan(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.trunk == "gpt" else None
        self.embedding_scale = nn.Parameter(torch.ones(1)) if plan.embedding_scale else None
        self.embed = plan.build("embed", config.width, config)
        depth = config.depth
        self.blocks = nn.ModuleList(Block(config, plan.of_block(index, depth), index) for index in range(depth))
        self.final = plan.build("final", config.width, config)
        # A tied head has no parameter of its own, so no tool can see the shared weight twice.
        self.head = None if config.is_tied else nn.Linear(config.width, config.vocabulary, bias=False)

    def _embed(self, tokens: Tensor, positions: Tensor | slice) -> Tensor:
        """fp32 up to and including the embed norm, then the compute dtype, which is also the residual stream's."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[positions]
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        x = _through(self.embed, x)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        config = self.config
        return F.dropout(x, config.dropout, self.training) if config.dropout else x

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

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
        x = self._embed(tokens, slice(length))
        rotary = None
        if config.trunk == "llama":
            rotary = rotary_table(length, config.head_width, config.rope_theta, tokens.device)
        mask = document_mask(documents)
        for block in self.blocks:
            x = block(x, rotary, mask)
        x = _through(self.final, x)
        weight = self._head_weight()
        if targets is None:
            return F.linear(x, weight)
        return cross_entropy_sum(x.flatten(0, 1), weight, targets.flatten(), z_loss, loss_chunk, self.fused)

    def extend(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [batch, vocabulary] of what follows ``tokens`` int64 [batch, length], which go on from those that
        ``cache`` holds; afterwards it holds these too."""
        positions, visible = cache.next_places(tokens.shape[1])
        x = self._embed(tokens, positions)
        rotary = None
        if cache.rotary is not None:
            cosine, sine = cache.rotary
            rotary = cosine[positions].unsqueeze(1), sine[positions].unsqueeze(1)
        for block, seen in zip(self.blocks, cache.blocks, strict=True):
            x = block(x, rotary, visible, seen)
        return F.linear(_through(self.final, x[:, -1]), self._head_weight())
