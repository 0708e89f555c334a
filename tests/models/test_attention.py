"""Attention sees the past of its own document and nothing else; positions are relative; groups share keys."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import attend, document_mask
from models.rotary import rotary_table, rotate
from tests.models.building import VOCABULARY, randn, scrambled, tiny, tokens

# One row sums to the same in another length or batch only up to fp32 rounding of terms of order 1.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("plan", ["llama", "dyt", "dnt", "dnt-s4", "olmo2", "sub-ln"])
@pytest.mark.parametrize("trunk", ["llama", "gpt"])
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit(plan: str, trunk: str) -> None:
    model = scrambled(tiny(plan=plan, trunk=trunk, kv_heads=2))
    ids = tokens(batch=1)
    before = model(ids)
    for position in (1, 7, 15):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCABULARY
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], **CLOSE)
        assert not torch.allclose(after[:, position:], before[:, position:], **CLOSE)


@settings(max_examples=15)
@given(cuts=st.sets(st.integers(1, 15), max_size=4))
@torch.no_grad()
def test_document_mask_equals_documents_alone(cuts: set[int]) -> None:
    """RoPE is relative, so a document that starts late equals the same document from position 0."""
    model = scrambled(tiny(plan="dnt", kv_heads=2))
    ids = tokens(batch=1)
    edges = [0, *sorted(cuts), 16]
    documents = torch.zeros_like(ids)
    for begin in edges[1:-1]:
        documents[:, begin:] += 1
    packed = model(ids, documents=documents)
    alone = torch.cat([model(ids[:, a:b]) for a, b in pairwise(edges)], dim=1)
    # the fp32 angles differ between position t and t - begin, by up to 16 * 2^-24
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_document_equals_no_mask_and_rows_have_their_own() -> None:
    model = scrambled(tiny(plan="llama"))
    ids = tokens(batch=2)
    documents = torch.zeros_like(ids)
    torch.testing.assert_close(model(ids, documents=documents), model(ids), **CLOSE)
    documents[1, 8:] = 1
    masked = model(ids, documents=documents)
    torch.testing.assert_close(masked[0], model(ids)[0], **CLOSE)
    assert not torch.allclose(masked[1, 8:], model(ids)[1, 8:], **CLOSE)


def test_the_mask_is_causal_within_a_document() -> None:
    mask = document_mask(torch.tensor([[5, 5, 7]]))
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]
    assert document_mask(None) is None


@given(query=st.integers(0, 20), key=st.integers(0, 20), shift=st.integers(1, 40), seed=st.integers(0, 100))
def test_rope_products_depend_on_the_distance_alone(query: int, key: int, shift: int, seed: int) -> None:
    cosine, sine = rotary_table(64, 8, 100.0, torch.device("cpu"))
    q, k = randn(1, 1, 1, 8, seed=seed), randn(1, 1, 1, 8, seed=seed + 1000)

    def product(i: int, j: int) -> torch.Tensor:
        return (rotate(q, (cosine[i : i + 1], sine[i : i + 1])) * rotate(k, (cosine[j : j + 1], sine[j : j + 1]))).sum()

    torch.testing.assert_close(product(query, key), product(query + shift, key + shift), atol=1e-4, rtol=0)


def test_rope_keeps_lengths_dtype_and_position_zero() -> None:
    x = randn(2, 3, 16, 8, dtype=torch.bfloat16)
    table = rotary_table(16, 8, 10000.0, torch.device("cpu"))
    turned = rotate(x, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    wide = x.float()
    torch.testing.assert_close(rotate(wide, table).norm(dim=-1), wide.norm(dim=-1))
    assert torch.equal(turned, rotate(wide, table).bfloat16())  # fp32 inside, one rounding


def test_grouped_queries_equal_repeated_heads() -> None:
    q, k, v = randn(2, 6, 5, 8), randn(2, 3, 5, 8, seed=1), randn(2, 3, 5, 8, seed=2)
    repeated = attend(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))
    torch.testing.assert_close(attend(q, k, v), repeated)
    mask = document_mask(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]))
    repeated = attend(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), mask)
    torch.testing.assert_close(attend(q, k, v, mask), repeated)


@torch.no_grad()
def test_a_grouped_model_equals_one_with_its_key_heads_repeated() -> None:
    few, many = scrambled(tiny(plan="llama", kv_heads=2)), scrambled(tiny(plan="llama"))
    weights = few.state_dict()
    for name in weights:
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    many.load_state_dict(weights)
    torch.testing.assert_close(many(tokens()), few(tokens()), **CLOSE)


def test_longer_than_the_context_is_refused() -> None:
    with pytest.raises(AssertionError, match="17 tokens exceed the context of 16"):
        scrambled(tiny())(tokens(length=17))
