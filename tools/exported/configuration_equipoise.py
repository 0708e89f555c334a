"""The configuration of an Equipoise model: a decoder-only transformer whose norms are data."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig


class EquipoiseConfig(PreTrainedConfig):
    """What ``config.json`` holds.

    ``sites`` says which function stands where: a site's name -> ``{"function": ..., and its settings}``. A site that is
    not there is the identity. The sites, with the residual stream x::

        x = embed(embedding_scale * embedding(tokens) + positions)          (positions: gpt trunk only)
        a = attn_in(x);  q, k, v = query(Wq a), key(Wk a), value(Wv a)
        x = attn_post( x + attn_out( Wo . attn_mid( attention(q, k, v) ) ) )
        m = mlp_in(x);   x = mlp_post( x + mlp_out( W2 . mlp_mid( act(mlp_act(W1 m)) ) ) )
        logits = head(final(x))

    With the llama trunk ``mlp_act`` is the gate's alone. The first ``first_blocks`` blocks have the sites that
    ``first_sites`` says in place of those.

    Functions and settings: ``rmsnorm`` (eps, gain), ``layernorm`` (eps, bias, gain), ``l2norm`` (eps); ``dyt``,
    ``derf``, ``hardtanh``, ``sigmoid``, ``logistic``, ``softsign``, ``isru``, ``identity`` (alpha, gain, beta, shift),
    which are ``gain * f(alpha * x + shift) + beta`` with an alpha that is ``learned`` or a number. What is false there
    is left out.

    ``residual`` says how the stream x and a branch f are added, with a learned a and c = ``residual_constant``::

        plain                               x + f(x)
        rezero                              x + a f(x), one number a block for both branches
        skipinit, fixup                     x + a f(x), one number a branch
        layerscale                          x + a f(x), one number a feature
        scaled                              x + c f(x)
        nf                                  x + c a f(x / sqrt(1 + i c^2)) for branch i = 0, 1, ... of the model
        deepnorm                            c x + f(x)

    ``weights`` says what the blocks' linears multiply by: the weight as it is (plain), its rows with mean 0 and a norm
    that is learned (standardized), or the weight over its spectral norm, times a learned number (sigma).
    """

    model_type = "equipoise"

    trunk: str = "llama"  # llama: rotary positions, SwiGLU; gpt: learned positions, GELU
    sites: dict[str, Any] = field(default_factory=dict)
    first_sites: dict[str, Any] = field(default_factory=dict)
    first_blocks: int = 0
    residual: str = "plain"
    residual_constant: float = 1.0
    weights: str = "plain"
    embedding_scale: bool = False  # a learned scalar after the embedding
    qk_scope: str = "head"  # what the query, key and value norms see: one head, or the whole projection
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

    def sites_of(self, layer: int) -> dict[str, Any]:
        """The sites of a block, counted from 0."""
        return self.first_sites if layer < self.first_blocks else self.sites
