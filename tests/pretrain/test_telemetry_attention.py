"""Entropy of attention: by hand where it is known, and of whole models against the softmax written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from models import ModelConfig, Transformer
from models.attention import document_mask
from models.initialization import initialize
from models.rotary import rotary_table, rotate
from pretrain.telemetry.attention import attention_entropies, query_positions, record_attention, visible_keys

LENGTH = 12


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_uniform_attention_has_the_logarithm_of_what_it_sees() -> None:
    positions = query_positions(LENGTH)
    assert positions.tolist() == list(range(LENGTH))
    visible = visible_keys(None, positions, 2, LENGTH)
    found = attention_entropies(torch.zeros(2, 4, LENGTH, 8), drawn(2, 2, LENGTH, 8), visible)
    expected = sum(math.log(position + 1) for position in range(LENGTH)) / LENGTH
    assert found.mean().item() == pytest.approx(expected, rel=1e-6)
    assert found.shape == (2, 4, LENGTH)


def test_attention_to_one_key_has_none() -> None:
    k = torch.eye(LENGTH).expand(1, 1, LENGTH, LENGTH)
    found = attention_entropies(1e4 * k, k, visible_keys(None, torch.arange(LENGTH), 1, LENGTH))
    assert found.abs().max() < 1e-6


def test_positions_are_spread_evenly() -> None:
    assert query_positions(1000, 4).tolist() == [125, 375, 625, 875]
    assert query_positions(3, 128).tolist() == [0, 1, 2]


@pytest.mark.parametrize("whole", [True, False])
def test_a_block_mask_shows_what_a_dense_one_does(whole: bool) -> None:
    """FlexAttention's, which a GPU has, and the CPU's, of the same documents."""
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3], [0] * LENGTH])

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents[b, q] == documents[b, k])

    block_mask = create_block_mask(seen, 2, None, LENGTH, LENGTH, device="cpu")
    positions = torch.arange(LENGTH) if whole else torch.tensor([1, 4, 11])
    dense = document_mask(documents)
    assert torch.equal(dense[:, :, positions], visible_keys(dense, positions, 2, LENGTH))
    assert torch.equal(
        visible_keys(block_mask, positions, 2, LENGTH), dense[:, :, positions].expand(2, 1, len(positions), LENGTH)
    )


def written_out(model: Transformer, block: int, x: Tensor, documents: Tensor | None) -> float:
    """Mean entropy in fp64 of a block's attention whose input is x, one head and query at a time."""
    attention = model.blocks[block].attention
    config = model.config
    batch, length, _ = x.shape
    q = attention.q(x).view(batch, length, config.heads, -1)
    k = attention.k(x).view(batch, length, config.key_value_heads, -1)
    if attention.query is not None:
        q, k = attention.query(q), attention.key(k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if config.trunk == "llama":
        table = rotary_table(length, config.head_width, config.rope_theta, x.device)
        q, k = rotate(q, table), rotate(k, table)
    total, count = 0.0, 0
    for b in range(batch):
        for h in range(config.heads):
            keys = k[b, h * config.key_value_heads // config.heads].double()
            for i in range(length):
                seen = [j for j in range(i + 1) if documents is None or documents[b, j] == documents[b, i]]
                weights = torch.softmax(keys[seen] @ q[b, h, i].double() / math.sqrt(config.head_width), 0)
                total -= sum(w * math.log(w) for w in weights.tolist())
                count += 1
    return total / count


@pytest.mark.parametrize(("plan", "trunk"), [("llama", "llama"), ("dnt", "llama"), ("dyt", "gpt")])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_of_a_model_it_is_the_softmax_s(plan: str, trunk: str, masked: bool) -> None:
    config = ModelConfig(
        plan=plan,
        trunk=trunk,  # type: ignore[arg-type]
        width=32,
        depth=2,
        heads=4,
        kv_heads=2 if trunk == "llama" else None,
        ffn_width=32,
        vocab_size=40,
        context=LENGTH,
    )
    model = Transformer(config)
    initialize(model, config, seed=1)
    for block in model.blocks:  # first weights attend almost uniformly
        block.attention.q.weight.mul_(20)
        block.attention.k.weight.mul_(20)
    tokens = torch.randint(40, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12]) if masked else None
    inputs: list[Tensor] = []
    handles = [
        block.attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in model.blocks
    ]
    with record_attention(model) as found:
        model(tokens, None, documents)
    for handle in handles:
        handle.remove()
    assert list(found) == ["blocks.0", "blocks.1"]
    for index, x in enumerate(inputs):
        expected = written_out(model, index, x, documents)
        assert found[f"blocks.{index}"].mean().item() == pytest.approx(expected, rel=1e-5)  # fp32
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bf16_does_not_blur_it() -> None:
    """Under autocast too, scores are fp32."""
    q, k = drawn(1, 2, LENGTH, 8, seed=3) * 4, drawn(1, 2, LENGTH, 8, seed=4)
    visible = visible_keys(None, torch.arange(LENGTH), 1, LENGTH)
    plain = attention_entropies(q, k, visible)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_entropies(q, k, visible), plain)
