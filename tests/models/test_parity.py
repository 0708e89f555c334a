"""Logits of the llama and gpt plans against transformers' models with the same weights.

fp32 and at most 1e-5 apart, for logits of order 1: the two sum in different orders and no more.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from models import ModelConfig, Transformer
from tests.models.building import scrambled, tiny, tokens

_LLAMA = {
    "attention.q.": "self_attn.q_proj.",
    "attention.k.": "self_attn.k_proj.",
    "attention.v.": "self_attn.v_proj.",
    "attention.out.": "self_attn.o_proj.",
    "feedforward.gate.": "mlp.gate_proj.",
    "feedforward.up.": "mlp.up_proj.",
    "feedforward.down.": "mlp.down_proj.",
    "attn_in.": "input_layernorm.",
    "mlp_in.": "post_attention_layernorm.",
}
_GPT2 = {
    "attention.out.": "attn.c_proj.",
    "feedforward.up.": "mlp.c_fc.",
    "feedforward.down.": "mlp.c_proj.",
    "attn_in.": "ln_1.",
    "mlp_in.": "ln_2.",
}


def as_llama(ours: Transformer, config: ModelConfig) -> nn.Module:
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.feedforward_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.is_tied,
            attn_implementation="eager",
        )
    )
    weights: dict[str, Tensor] = {}
    for name, parameter in ours.named_parameters():
        for own, other in _LLAMA.items():
            name = name.replace(own, other)
        name = name.replace("blocks.", "model.layers.").replace("embedding.", "model.embed_tokens.")
        name = name.replace("final.", "model.norm.").replace("head.", "lm_head.")
        weights[name] = parameter.detach()
    if config.is_tied:
        weights["lm_head.weight"] = ours.embedding.weight.detach()
    theirs.load_state_dict(weights, strict=True)
    return theirs


def transposed(parameter: Tensor) -> Tensor:
    """A linear's matrix as GPT-2's Conv1D holds it, [in, out]; a vector as it is."""
    return parameter.mT if parameter.ndim == 2 else parameter


def as_gpt2(ours: Transformer, config: ModelConfig) -> nn.Module:
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocabulary,
            n_embd=config.width,
            n_inner=config.feedforward_width,
            n_layer=config.depth,
            n_head=config.heads,
            n_positions=config.context,
            layer_norm_epsilon=config.norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        )
    )
    own = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    weights: dict[str, Tensor] = {
        "transformer.wte.weight": own.pop("embedding.weight"),
        "transformer.wpe.weight": own.pop("positions.weight"),
        "transformer.ln_f.weight": own.pop("final.weight"),
        "transformer.ln_f.bias": own.pop("final.bias"),
    }
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    for i in range(config.depth):
        for kind in ("weight", "bias"):
            packed = torch.cat([own.pop(f"blocks.{i}.attention.{part}.{kind}") for part in "qkv"])
            weights[f"transformer.h.{i}.attn.c_attn.{kind}"] = transposed(packed)
    for name, parameter in own.items():
        for mine, other in _GPT2.items():
            name = name.replace(mine, other)
        weights[name.replace("blocks.", "transformer.h.")] = transposed(parameter)
    theirs.load_state_dict(weights, strict=True)
    return theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@torch.no_grad()
def test_llama(tied: bool, kv_heads: int | None) -> None:
    config = tiny(plan="llama", trunk="llama", tied=tied, kv_heads=kv_heads, norm_eps=1e-3, rope_theta=500.0)
    ours = scrambled(config)
    expected = as_llama(ours, config)(tokens()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(tokens()), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gpt2() -> None:
    config = tiny(plan="gpt", trunk="gpt", bias=True, ffn_width=None, norm_eps=1e-3)
    ours = scrambled(config)
    expected = as_gpt2(ours, config)(tokens(length=12)).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(tokens(length=12)), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bf16_autocast_stays_near_fp32() -> None:
    """What a GPU trains in: bf16 has 8 bits, so the dozen roundings on the way add up to a percent or two."""
    model = scrambled(tiny(plan="llama"))
    exact = model(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens())
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() / exact.norm() < 0.03
