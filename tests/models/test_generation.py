"""Sampling: greedy by hand, nucleus, seeds, the window of the context, the cache, prompts side by side."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from models import ModelConfig, Transformer
from models.generation import sample
from models.transformer import Cache
from tests.models.building import scrambled, tiny, tokens

MODELS: dict[str, ModelConfig] = {
    **{plan: tiny(plan=plan) for plan in ("llama", "gpt", "dyt", "derf", "dnt", "peri", "sub-ln", "olmo2", "none")},
    "gpt trunk": tiny(plan="gpt", trunk="gpt", bias=True),
    "gpt trunk, untied": tiny(plan="dnt", trunk="gpt", tied=False),
    "grouped": tiny(plan="dnt", kv_heads=2),
    "one kv head, tied": tiny(plan="olmo2", kv_heads=1, tied=True),
}


def made(model: Transformer, prompts: list[list[int]], count: int, **settings: Any) -> list[list[int]]:
    """What each prompt is continued by. A prompt that has ended stays so."""
    rows: list[list[int]] = [[] for _ in prompts]
    for step, chosen in enumerate(sample(model, prompts, count, **settings)):
        for row, token in zip(rows, chosen, strict=True):
            if token is not None:
                assert len(row) == step
                row.append(token)
    return rows


@torch.no_grad()
def greedy_by_hand(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The argmax of the whole model on the last tokens of its context, one pass a token."""
    row = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([row[-model.config.context :]]))[0, -1].tolist()
        row.append(max(range(len(logits)), key=logits.__getitem__))
    return row[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_one_pass(name: str) -> None:
    """After five tokens at once, then token by token, as far as the context of 16."""
    config = MODELS[name]
    model = scrambled(config).eval()
    ids = tokens()
    expected = model(ids)
    cache = Cache(config, torch.zeros(2, dtype=torch.long), 16)
    for begin, end in ((0, 5), *((place, place + 1) for place in range(5, 16))):
        assert not cache.full
        # fp32 logits of some units; the same sums over fewer rows at a time
        torch.testing.assert_close(model.extend(ids[:, begin:end], cache), expected[:, end - 1], atol=1e-5, rtol=1e-5)
    assert cache.full
    held = cache.blocks[0]._held
    assert held is not None
    assert held[0].shape == (2, config.key_value_heads, 16, 8), "grouped heads are held once"


@torch.no_grad()
@pytest.mark.parametrize("name", ["dnt", "dyt", "gpt trunk", "grouped"])
def test_padding_is_not_seen(name: str) -> None:
    """Rows of 3 and 8 tokens that end together; what stands in the padding does not change one bit."""
    config = MODELS[name]
    model = scrambled(config).eval()
    ids = tokens(length=11)
    results = []
    for filler in (0, 60):
        padded = ids.clone()
        padded[0, :5] = filler
        cache = Cache(config, torch.tensor([5, 0]), 16)
        assert cache.next_places(8)[1].any(dim=-1).all(), "no softmax is over nothing, which some kernels make NaN"
        results.append([model.extend(part, cache) for part in padded.split([8, 1, 1, 1], dim=1)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    for step, logits in enumerate(results[0]):
        end = 8 + step
        short, long = model(ids[:1, 5:end])[0, -1], model(ids[1:, :end])[0, -1]
        torch.testing.assert_close(logits, torch.stack((short, long)), atol=1e-5, rtol=1e-5)


def test_a_cache_holds_no_more_than_it_was_made_for() -> None:
    config = tiny()
    model = scrambled(config)
    cache = Cache(config, torch.zeros(1, dtype=torch.long), 4)
    with pytest.raises(AssertionError, match="5 tokens exceed a cache for 4"):
        model.extend(tokens(batch=1, length=5), cache)
    with pytest.raises(AssertionError, match="17 tokens exceed the context of 16"):
        Cache(config, torch.zeros(1, dtype=torch.long), 17)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_by_hand(name: str, cached: bool) -> None:
    """Prompts of different lengths beside each other, one of them longer than the context of 16, and past it."""
    model = scrambled(MODELS[name]).eval()
    for lengths in ((5, 2, 5), (9, 19)):
        prompts = [tokens(batch=1, length=length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
        by_hand = [greedy_by_hand(model, prompt, 20) for prompt in prompts]
        assert made(model, prompts, 20, temperature=0, cached=cached) == by_hand


def test_the_cache_spares_the_work() -> None:
    model = scrambled(tiny())
    lengths: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    made(model, [[1, 2, 3]], 5)
    assert lengths == [3, 1, 1, 1, 1]
    lengths.clear()
    made(model, [[1, 2, 3]], 5, cached=False)
    assert lengths == [3, 4, 5, 6, 7]
    lengths.clear()
    made(model, [[1] * 14], 5)
    assert lengths == [14, 1, 1, 16, 16], "past the context every token has another position"


def fixed(probabilities: list[float]) -> Transformer:
    """A model with the same next-token probabilities whatever came before."""
    config = tiny(plan="none", vocab_size=len(probabilities), context=4, depth=1)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert model.head is not None
    with torch.no_grad():
        model.embedding.weight[:, 0] = 1.0
        model.head.weight[:, 0] = torch.tensor(probabilities).log()
    return model


def draws(model: Transformer, count: int = 1500, **settings: Any) -> Counter[int]:
    return Counter(made(model, [[0]], count, **settings)[0])


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, {2}), (0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(fixed([0.3, 0.05, 0.5, 0.15]), 200, temperature=1.0, top_p=top_p)) == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_tempered_probabilities(temperature: float) -> None:
    probabilities = [0.3, 0.05, 0.5, 0.15]
    counts = draws(fixed(probabilities), temperature=temperature, top_p=1.0)
    powers = [p ** (1 / temperature) for p in probabilities]
    for piece, power in enumerate(powers):
        expected = power / sum(powers)
        spread = (expected * (1 - expected) / 1500) ** 0.5
        assert abs(counts[piece] / 1500 - expected) < 5 * spread


def test_pieces_beyond_the_tokenizer_are_never_drawn() -> None:
    model = fixed([0.1, 0.1, 0.4, 0.4])
    assert set(draws(model, 200, pieces=2, top_p=1.0)) == {0, 1}
    assert set(draws(model, 10, pieces=2, temperature=0)) == {0}


def test_seeds_decide() -> None:
    model = scrambled(tiny())
    one, same, other = (made(model, [[3, 4, 5]], 12, seed=seed, temperature=2.0) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_prompt_draws_the_same_whatever_stands_beside_it() -> None:
    """Prompt i of a batch is the single prompt under seed + i."""
    model = scrambled(tiny(plan="dyt")).eval()
    prompts = [[3, 4, 5], [7], [3, 4, 5], [9, 8]]
    together = made(model, prompts, 12, seed=40, temperature=2.0)
    assert together == [made(model, [prompt], 12, seed=40 + i, temperature=2.0)[0] for i, prompt in enumerate(prompts)]
    assert together[0] != together[2], "two samples of one prompt"


def test_a_row_ends_at_the_stop_token_and_all_rows_end_the_work() -> None:
    model = scrambled(tiny(plan="dyt")).eval()
    prompts = [[3, 4, 5], [7], [9, 8]]
    free = made(model, prompts, 40, temperature=2.0, seed=1)
    stop = Counter(token for row in free for token in row).most_common(1)[0][0]
    ends = [row.index(stop) if stop in row else None for row in free]
    assert any(ends), "a row that ends after its first token"
    assert made(model, prompts, 40, temperature=2.0, seed=1, stop=stop) == [
        row[:end] for row, end in zip(free, ends, strict=True)
    ]
    certain = fixed([0.0, 1.0])
    assert list(sample(certain, [[0], [0]], 5, stop=1)) == []


def test_nothing_to_add_and_nothing_to_start_from() -> None:
    model = scrambled(tiny())
    assert list(sample(model, [[1]], 0)) == []
    with pytest.raises(AssertionError, match="at least one token"):
        next(sample(model, [[1], []], 1))


def test_no_graph_is_kept() -> None:
    """Between two tokens the caller's own gradient mode holds."""
    model = scrambled(tiny())
    outputs: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda _, __, output: outputs.append(output))
    for _ in sample(model, [[1]], 2):
        assert torch.is_grad_enabled()
    assert not any(output.requires_grad for output in outputs)
