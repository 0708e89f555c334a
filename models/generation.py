"""Sampling from a model: temperature, nucleus, seeded; a cache of keys and values, prompts of different lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.transformer import Cache, Transformer


@torch.no_grad()
def sample(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    pieces: int | None = None,
    stop: int | None = None,
    seed: int = 0,
    cached: bool = True,
) -> Iterator[list[int | None]]:
    """Continue every prompt by at most ``count`` tokens: yields the next token of each, None for one that has ended.

    A prompt ends at the token ``stop``, which is not yielded. The model sees the last ``context`` tokens; once there
    are more, each token moves all others to another position, and the cache no longer serves. ``temperature`` 0 is
    greedy. ``top_p`` keeps the smallest set of tokens whose probability reaches it (arXiv 1904.09751). ``pieces`` is
    the tokenizer's size, where the vocabulary is padded beyond it. Prompt i draws from the seed ``seed + i``, whatever
    stands beside it.
    """
    assert all(prompts), "a prompt holds at least one token"
    device = model.embedding.weight.device
    context = model.config.context
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(len(prompts))]
    running = [True] * len(prompts)
    cache: Cache | None = None
    for _ in range(count):
        if cache is None or cache.full or not cached:
            window = tokens[:, -context:]
            outside = tokens.shape[1] - window.shape[1]
            cache = Cache(model.config, (padding - outside).clamp(min=0), min(context, longest + count))
            logits = model.extend(window, cache)
        else:
            logits = model.extend(tokens[:, -1:], cache)
        choice = _choose(logits[:, :pieces].float(), temperature, top_p, generators)
        chosen: list[int] = choice.flatten().tolist()
        running = [was and token != stop for was, token in zip(running, chosen, strict=True)]
        if not any(running):
            return
        yield [token if goes_on else None for token, goes_on in zip(chosen, running, strict=True)]
        tokens = torch.cat((tokens, choice), dim=1)


def _choose(logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row, int64 [batch, 1], each row with its own generator."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
    probabilities = probabilities.masked_fill(outside, 0.0)
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, generators, strict=True)]
    return order.gather(1, torch.stack(drawn))
