"""Sampling: greedy by hand, nucleus, seeds, the window of the context."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from models import ModelConfig
from models.generation import sample
from tests.models.building import scrambled, tiny, tokens


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def test_greedy_is_the_argmax_by_hand() -> None:
    """Past the context too, where the model sees its last 16 tokens."""
    model = scrambled(tiny(plan="dnt"))
    prompt = tokens(batch=2, length=5)
    rows = prompt.tolist()
    for _ in range(15):
        for row in rows:
            logits = model(torch.tensor([row[-16:]]))[0, -1].tolist()
            row.append(max(range(len(logits)), key=logits.__getitem__))
    made = sample(model, prompt, 15, temperature=0)
    assert made.tolist() == rows
    assert torch.equal(made[:, :5], prompt)


class Fixed(nn.Module):
    """The same next-token probabilities whatever came before."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.config = ModelConfig(context=4)
        self.logits = torch.tensor(probabilities).log()
        self.longest = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.longest = max(self.longest, ids.shape[1])
        return self.logits.expand(*ids.shape, -1)


def draws(model: nn.Module, count: int = 4000, **settings: float) -> Counter[int]:
    made = sample(model, torch.zeros(count, 1, dtype=torch.long), 1, generator=seeded(0), **settings)
    return Counter(made[:, 1].tolist())


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, {2}), (0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(Fixed([0.3, 0.05, 0.5, 0.15]), temperature=1.0, top_p=top_p)) == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_tempered_probabilities(temperature: float) -> None:
    probabilities = [0.3, 0.05, 0.5, 0.15]
    counts = draws(Fixed(probabilities), temperature=temperature, top_p=1.0)
    powers = [p ** (1 / temperature) for p in probabilities]
    for piece, power in enumerate(powers):
        expected = power / sum(powers)
        spread = (expected * (1 - expected) / 4000) ** 0.5
        assert abs(counts[piece] / 4000 - expected) < 5 * spread


def test_seeds_decide() -> None:
    model = scrambled(tiny())
    one, same, other = (sample(model, tokens(length=3), 12, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_model_sees_its_context_and_no_more() -> None:
    model = Fixed([0.5, 0.5])
    assert sample(model, torch.zeros(1, 9, dtype=torch.long), 3).shape == (1, 12)
    assert model.longest == 4


def test_nothing_to_add_and_nothing_to_start_from() -> None:
    model = scrambled(tiny())
    assert torch.equal(sample(model, tokens(), 0), tokens())
    with pytest.raises(AssertionError, match="at least one token"):
        sample(model, tokens(length=0), 1)
