"""An Equipoise model for transformers: one decoder-only transformer, whose norms are data from its configuration.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Read ``EquipoiseConfig`` first: its docstring is the model on one screen. The names of the parameters are those of the
code that trained it, under ``model.``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from tools.exported.branches_equipoise import MadeLinear, Residual, linear
from tools.exported.configuration_equipoise import EquipoiseConfig
from tools.exported.norms_equipoise import SITES, Elementwise, LayerNorm, RMSNorm, norm, through, wide


def rotary_table(config: EquipoiseConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at ``positions`` [batch, length], fp32 [batch, 1, length, head width / 2]."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * config.rope_theta ** -(pairs / config.head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE (arXiv 2104.09864) on x [batch, heads, length, head width], where features i and i + half are a pair."""
    cosine, sine = table
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cosine - x2 * sine, x2 * cosine + x1 * sine), dim=-1).to(x.dtype)


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """``attn_implementation="eager"``: transformers adds the mask, and wants [batch, length, heads, head width]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * scaling
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


class Attention(nn.Module):
    """``Wo . attn_mid(attention(query(Wq a), key(Wk a), value(Wv a)))``: causal, with grouped queries."""

    is_causal = True  # what transformers' attention functions ask their caller

    def __init__(self, config: EquipoiseConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q = linear(config, width, width)
        self.k = linear(config, width, kv_width)
        self.v = linear(config, width, kv_width)
        self.out = linear(config, width, width)
        self.per_head = config.qk_scope == "head"
        sites = config.sites_of(layer)
        self.query = norm(sites, "query", config.head_dim if self.per_head else width)
        self.key = norm(sites, "key", config.head_dim if self.per_head else kv_width)
        self.value = norm(sites, "value", config.head_dim if self.per_head else kv_width)
        self.attn_mid = norm(sites, "attn_mid", width)

    def heads(self, x: Tensor, function: nn.Module | None) -> Tensor:
        """[batch, length, features] -> [batch, heads, length, head width], through the norm."""
        x = x if self.per_head else through(function, x)
        x = x.unflatten(-1, (-1, self.config.head_dim))
        return (through(function, x) if self.per_head else x).transpose(1, 2)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Any, cache: Cache | None) -> Tensor:
        q, k = self.heads(self.q(x), self.query), self.heads(self.k(x), self.key)
        v = self.heads(self.v(x), self.value)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, _ = attend(self, q, k, v, mask, scaling=self.config.head_dim**-0.5)
        return self.out(through(self.attn_mid, y.flatten(-2)))


class FeedForward(nn.Module):
    """``W2 . mlp_mid(act(W1 m))``; llama: ``silu(mlp_act(Wgate m)) * Wup m`` (arXiv 2002.05202), gpt:
    ``gelu(mlp_act(Wup m))``, GELU in its tanh form."""

    def __init__(self, config: EquipoiseConfig, layer: int) -> None:
        super().__init__()
        width, hidden, sites = config.hidden_size, config.intermediate_size, config.sites_of(layer)
        self.gate = linear(config, width, hidden) if config.trunk == "llama" else None
        self.up = linear(config, width, hidden)
        self.down = linear(config, hidden, width, after_activation=True)
        self.mlp_act = norm(sites, "mlp_act", hidden)
        self.mlp_mid = norm(sites, "mlp_mid", hidden)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        z = through(self.mlp_act, up if self.gate is None else self.gate(x))
        h = F.gelu(z, approximate="tanh") if self.gate is None else F.silu(z) * up
        return self.down(through(self.mlp_mid, h))


class Block(GradientCheckpointingLayer):
    """``x = attn_post(x + attn_out(attention(attn_in(x))))``, then ``mlp_post(x + mlp_out(feedforward(mlp_in(x))))``;
    ``Residual`` may have other sums."""

    def __init__(self, config: EquipoiseConfig, layer: int) -> None:
        super().__init__()
        width, sites = config.hidden_size, config.sites_of(layer)
        self.attn_in = norm(sites, "attn_in", width)
        self.attention = Attention(config, layer)
        self.attn_out = norm(sites, "attn_out", width)
        self.attn_post = norm(sites, "attn_post", width)
        self.mlp_in = norm(sites, "mlp_in", width)
        self.feedforward = FeedForward(config, layer)
        self.mlp_out = norm(sites, "mlp_out", width)
        self.mlp_post = norm(sites, "mlp_post", width)
        self.residual = Residual(config, layer)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Any, past_key_values: Cache | None
    ) -> Tensor:
        a = through(self.attn_in, self.residual.enter(x, 0))
        a = through(self.attn_out, self.attention(a, rotary, mask, past_key_values))
        x = through(self.attn_post, self.residual.join(x, F.dropout(a, self.dropout, self.training), 0))
        m = through(self.mlp_in, self.residual.enter(x, 1))
        m = through(self.mlp_out, self.feedforward(m))
        return through(self.mlp_post, self.residual.join(x, F.dropout(m, self.dropout, self.training), 1))


class Transformer(nn.Module):
    """The parameters between tokens and logits. A tied head has none of its own: it is the embedding's."""

    def __init__(self, config: EquipoiseConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width) if config.trunk == "gpt" else None
        self.embedding_scale = nn.Parameter(torch.full((1,), math.sqrt(width))) if config.embedding_scale else None
        self.embed = norm(config.sites, "embed", width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.final = norm(config.sites, "final", width)
        self.head = None if config.tie_word_embeddings else nn.Linear(width, config.vocab_size, bias=False)

    def enter(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """Embedded tokens -> the residual stream. fp32 up to and including the embed norm."""
        dtype = embedded.dtype
        if torch.is_autocast_enabled(embedded.device.type):
            dtype = torch.get_autocast_dtype(embedded.device.type)
        x = wide(embedded)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        x = through(self.embed, x).to(dtype)
        return F.dropout(x, self.config.dropout, self.training)

    def logits(self, x: Tensor) -> Tensor:
        """What the head makes of the normalized residual stream."""
        return F.linear(x, self.embedding.weight if self.head is None else self.head.weight)


class EquipoiseForCausalLM(PreTrainedModel, GenerationMixin):
    """The model in transformers' ways: cache, ``generate``, loss of labels, gradient checkpointing."""

    config_class = EquipoiseConfig
    config: EquipoiseConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _input_embed_layer = "embedding"

    def __init__(self, config: EquipoiseConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config)
        self._no_split_modules = ["Block"]
        self._skip_keys_device_placement = ["past_key_values"]
        # an alpha rounded to bf16 is off by up to 0.4 % at every site
        scalars = [r"\.embedding_scale$", r"\.residual\.", r"\.gain$"]
        self._keep_in_fp32_modules_strict = [rf"\.{site}\." for site in SITES] + scalars
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # the linears and embeddings
        if isinstance(module, RMSNorm | LayerNorm | Elementwise):
            for name, parameter in module.named_parameters(recurse=False):
                init.constant_(parameter, 1.0 if name in ("weight", "alpha") else 0.0)
        if isinstance(module, MadeLinear):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.ones_(module.gain)
            if module.bias is not None:
                init.zeros_(module.bias)
        if isinstance(module, Residual):
            for parameter in module.parameters():
                init.constant_(parameter, module.initial)
        if isinstance(module, Transformer) and module.embedding_scale is not None:
            init.constant_(module.embedding_scale, math.sqrt(self.config.hidden_size))

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Tokens int64 [batch, length], or their embeddings, to logits [batch, length, vocabulary].

        ``labels`` are the tokens themselves, -100 for those without a loss; they are shifted here. Without
        ``use_cache`` the configuration decides, but there is no cache in training. ``logits_to_keep`` is the number
        of last places that get logits (0: all), or their indices.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: this model does not return attention weights")
        if inputs_embeds is None:
            inputs_embeds = self.model.embedding(input_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device)[None]

        x = self.model.enter(inputs_embeds, position_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = rotary_table(self.config, position_ids) if self.config.trunk == "llama" else None
        hidden_states = []
        for block in self.model.blocks:
            hidden_states += [x] if output_hidden_states else []
            x = block(x, rotary, mask, past_key_values=past_key_values)
        x = through(self.model.final, x)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )
