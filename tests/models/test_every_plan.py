"""Every plan on either trunk: some steps of training, a gradient for every parameter, a cache that changes nothing."""

from __future__ import annotations

import pytest
import torch

from models import PLANS
from models.transformer import Cache
from tests.models.building import build, scrambled, tiny, tokens


@pytest.mark.parametrize("trunk", ["llama", "gpt"])
@pytest.mark.parametrize("plan", PLANS)
def test_trains(plan: str, trunk: str) -> None:
    """Ten steps on one batch, in bf16 as on a GPU: finite throughout, the loss well below where it began."""
    model = build(tiny(plan=plan, trunk=trunk, depth=4, kv_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            objective, nll = model(tokens(), tokens(seed=1))
        objective.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nll.item() / 32)
    assert losses[-1] < losses[0] - 0.5


@torch.no_grad()
@pytest.mark.parametrize("trunk", ["llama", "gpt"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_cache_changes_nothing(plan: str, trunk: str) -> None:
    config = tiny(plan=plan, trunk=trunk, kv_heads=2)
    model = scrambled(config, dtype=torch.float64).eval()
    expected, cache = model(tokens()), Cache(config, torch.zeros(2, dtype=torch.long), 16)
    for begin, end in ((0, 5), *((place, place + 1) for place in range(5, 16))):
        # fp64; the same sums over fewer rows at a time, and rotary angles that are fp32 by design
        found = model.extend(tokens()[:, begin:end], cache)
        torch.testing.assert_close(found, expected[:, end - 1], atol=1e-6, rtol=1e-6)
