"""The reference of tools/bench.py: nanoGPT's model and the shape of its loop, written anew from its architecture.

What makes it nanoGPT (github.com/karpathy/nanoGPT, MIT): one projection for query, key and value, LayerNorm without
bias, exact GELU, a tied head, cross-entropy on the logits of the whole micro-batch, random offsets into a memory map
fetched while the forward's results are under way, torch's AdamW (fused on a GPU only), clipping in every step.
Checkpoints, evaluation and logging are left out, here and of what it is compared with.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Causal, with query, key and value in one product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class NanoGPT(nn.Module):
    """Tokens and targets, int64 [batch, length], to their mean cross-entropy in nats, fp32 []."""

    def __init__(self, *, vocabulary: int, width: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                to_stream = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if to_stream else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class NanoGPTLoop:
    """Training steps of a NanoGPT of ``accumulation`` micro-batches of ``micro_batch`` sequences each.

    ``data`` is a file of tokens of type ``dtype``. ``bf16`` is autocast, which nanoGPT itself uses on a GPU only.
    """

    def __init__(
        self,
        model: NanoGPT,
        data: Path,
        dtype: str,
        device: torch.device,
        *,
        length: int,
        micro_batch: int,
        accumulation: int,
        bf16: bool,
        compiled: bool,
    ) -> None:
        self._data, self._dtype, self._device = data, dtype, device
        self._length, self._micro_batch, self._accumulation = length, micro_batch, accumulation
        self._bf16 = bf16
        self._weights = list(model.to(device).parameters())
        self._model = torch.compile(model) if compiled else model
        matrices = [p for p in self._weights if p.dim() >= 2]
        vectors = [p for p in self._weights if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        fused = True if device.type == "cuda" else None  # None: torch chooses among its other implementations
        self._optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=fused)
        self._next = self._fetch()

    def _fetch(self) -> tuple[Tensor, Tensor]:
        tokens = np.memmap(self._data, dtype=self._dtype, mode="r")  # anew each time, or the pages read stay resident
        offsets = torch.randint(len(tokens) - self._length, (self._micro_batch,)).tolist()
        rows = torch.stack([torch.from_numpy(tokens[i : i + self._length + 1].astype(np.int64)) for i in offsets])
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if self._device.type != "cuda":
            return inputs, targets
        return (
            inputs.pin_memory().to(self._device, non_blocking=True),
            targets.pin_memory().to(self._device, non_blocking=True),
        )

    def step(self) -> None:
        for _ in range(self._accumulation):
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                loss = self._model(*self._next) / self._accumulation
            self._next = self._fetch()
            loss.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Nothing is left running."""
