"""The configuration of an Equipoise model: a decoder-only transformer whose norms are data."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig


class EquipoiseConfig(PreTrainedConfig):
    """What ``config.json`` holds.

    ``sites`` says which function normalizes where: a site's name -> ``{"function": ..., and its settings}``. A site
    that is not there is the identity. The sites, with the residual stream x::

        x = embed(embedding_scale * embedding(tokens) + positions)          (positions: gpt trunk only)
        a = attn_in(x);  q, k, v = Wq a, Wk a, Wv a;  q, k = query(q), key(k)
        x = x + attn_out( Wo . attn_mid( attention(q, k, v) ) )
        m = mlp_in(x);   x = x + mlp_out( W2 . mlp_mid( act(W1 m) ) )
        logits = head(final(x))

    Functions and settings: ``rmsnorm`` (eps), ``layernorm`` (eps, bias), ``l2norm`` (eps), ``dyt`` (beta), ``derf``
    (beta).
    """

    model_type = "equipoise"

    trunk: str = "llama"  # llama: rotary positions, SwiGLU; gpt: learned positions, GELU
    sites: dict[str, Any] = field(default_factory=dict)
    embedding_scale: bool = False  # a learned scalar after the embedding
    qk_scope: str = "head"  # what the query and key norms see: one head, or the whole projection
    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    intermediate_size: int = 5504
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    bias: bool = False  # in the linears
    tie_word_embeddings: bool = False
    dropout: float = 0.0  # after the embedding and each branch
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("rope_scaling") or kwargs.get("rope_parameters"):
            raise ValueError("Equipoise models have plain rotary positions: remove rope_scaling and rope_parameters")
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
