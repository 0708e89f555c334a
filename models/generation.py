"""Sampling from a model: temperature, nucleus, seeded."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt: Tensor,
    count: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    pieces: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue ``prompt`` int64 [batch, length] by ``count`` tokens; the model sees its last ``context`` of them.

    ``temperature`` 0 is greedy. ``top_p`` keeps the smallest set of tokens whose probability reaches it
    (arXiv 1904.09751). ``pieces`` is the tokenizer's size, where the vocabulary is padded beyond it. Returns int64
    [batch, length + count].
    """
    assert prompt.shape[1] > 0, "the prompt holds at least one token"
    context: int = model.config.context  # type: ignore[union-attr, assignment]
    tokens = prompt
    for _ in range(count):
        logits = model(tokens[:, -context:])[:, -1, :pieces].float()
        if temperature == 0:
            choice = logits.argmax(dim=-1, keepdim=True)
        else:
            probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
            outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
            probabilities = probabilities.masked_fill(outside, 0.0)
            choice = order.gather(1, torch.multinomial(probabilities, 1, generator=generator))
        tokens = torch.cat((tokens, choice), dim=1)
    return tokens
