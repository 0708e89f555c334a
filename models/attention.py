"""Causal self-attention with grouped queries, rotary positions, and norm sites on query, key, value and output."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels
from models.config import ModelConfig
from models.norms import RMSNorm
from models.plan import NormPlan
from models.rotary import rotate
from models.weights import build_linear

if torch.cuda.is_available():  # FlexAttention has no backward on the CPU, and loading the compiler takes seconds
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _flex_attention = torch.compile(flex_attention)
    _create_block_mask = torch.compile(create_block_mask)


def document_mask(documents: Tensor | None) -> Any:
    """What ``attend`` needs to keep attention within a document, made once a forward and shared by all blocks.

    ``documents`` is int [batch, length], the running number of each token's document. FlexAttention's block mask on
    a GPU; on the CPU, where FlexAttention has no backward, a boolean mask [batch, 1, length, length].
    """
    if documents is None:
        return None
    batch, length = documents.shape
    if documents.device.type == "cuda":

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (documents[b, q] == documents[b, k])

        return _create_block_mask(visible, batch, None, length, length, device=documents.device)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """Causal attention of q [batch, heads, length, head width] over k, v [batch, kv heads, length, head width]."""
    grouped = q.shape[1] != k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return _flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)


class KeyValues:
    """Keys and values of the at most ``capacity`` tokens that one attention has seen, in its key and value heads."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._held: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, those of the new tokens (k, v [batch, kv heads, length, head width]) at the end."""
        if self._held is None:
            batch, heads, _, width = k.shape
            self._held = (
                k.new_empty(batch, heads, self.capacity, width),
                v.new_empty(batch, heads, self.capacity, width),
            )
        begin, self.length = self.length, self.length + k.shape[2]
        keys, values = self._held
        keys[:, :, begin : self.length] = k
        values[:, :, begin : self.length] = v
        return keys[:, :, : self.length], values[:, :, : self.length]


class Attention(nn.Module):
    """``Wo . attn_mid(attention(query(Wq a), key(Wk a), value(Wv a)))`` for a [batch, length, width]."""

    fused = False

    def __init__(self, config: ModelConfig, plan: NormPlan) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.per_head = plan.qk_scope == "head"
        kv_width = config.key_value_heads * config.head_width
        linear = partial(build_linear, plan.weights, bias=config.bias)
        self.q = linear(config.width, config.width)
        self.k = linear(config.width, kv_width)
        self.v = linear(config.width, kv_width)
        self.out = linear(config.width, config.width)
        self.query = plan.build("query", self.head_width if self.per_head else config.width, config)
        self.key = plan.build("key", self.head_width if self.per_head else kv_width, config)
        self.value = plan.build("value", self.head_width if self.per_head else kv_width, config)
        self.attn_mid = plan.build("attn_mid", config.width, config)

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """[batch, length, features] -> [batch, heads, length, head width], through the norm."""
        if norm is not None and not self.per_head:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_width))
        if norm is not None and self.per_head:
            x = norm(x)
        return x.transpose(1, 2)

    def _rotated(self, x: Tensor, norm: nn.Module | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """``_heads``, turned by their positions; in one pass with their norm where the kernels have it."""
        if rotary is None:
            return self._heads(x, norm)
        if not self.fused or rotary[0].dim() > 2:  # rows have positions of their own where a cache is
            return rotate(self._heads(x, norm), rotary)
        if self.per_head and isinstance(norm, RMSNorm) and not kernels.is_watched(norm):
            heads = x.unflatten(-1, (-1, self.head_width))
            return kernels.rms_norm_rotate(heads, *rotary, norm.weight, norm.eps).transpose(1, 2)
        return kernels.rotate(self._heads(x, norm).transpose(1, 2), *rotary).transpose(1, 2)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Any, seen: KeyValues | None = None
    ) -> Tensor:
        q, k = self._rotated(self.q(x), self.query, rotary), self._rotated(self.k(x), self.key, rotary)
        v = self._heads(self.v(x), self.value)
        if seen is not None:
            k, v = seen.append(k, v)
        y = attend(q, k, v, mask).transpose(1, 2).flatten(-2)
        if self.attn_mid is not None:
            y = self.attn_mid(y)
        return self.out(y)
