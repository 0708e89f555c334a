"""An Equipoise model for transformers: one decoder-only transformer, whose norms are data from its configuration.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Read ``EquipoiseConfig`` first: its docstring is the model on one screen. The names of the parameters are those of the
code that trained it, under ``model.``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

from tools.exported.configuration_equipoise import EquipoiseConfig


def wide(x: Tensor) -> Tensor:
    """Half precision -> fp32: norms compute there, whatever the dtype of the model."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RMSNorm(nn.Module):
    """``gain * x / sqrt(mean(x^2) + eps)`` (arXiv 1910.07467)."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(wide(x), self.weight.shape, wide(self.weight), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """``gain * (x - mean) / sqrt(var + eps) (+ shift)`` (arXiv 1607.06450)."""

    def __init__(self, features: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else wide(self.bias)
        return F.layer_norm(wide(x), self.weight.shape, wide(self.weight), bias, self.eps).to(x.dtype)


class L2Norm(nn.Module):
    """``x / max(|x|, eps)``: unit length, no parameters."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(wide(x), dim=-1, eps=self.eps).to(x.dtype)


class DyT(nn.Module):
    """``gain * tanh(alpha * x) (+ beta)``: no normalization, a bounded function instead (arXiv 2503.10622)."""

    def __init__(self, features: int, beta: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if beta else None

    def forward(self, x: Tensor) -> Tensor:
        y = wide(self.weight) * torch.tanh(wide(self.alpha) * wide(x))
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Derf(nn.Module):
    """``gain * erf(alpha * x + shift) (+ beta)`` with a scalar shift (arXiv 2512.10938)."""

    def __init__(self, features: int, beta: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if beta else None

    def forward(self, x: Tensor) -> Tensor:
        y = wide(self.weight) * torch.erf(wide(self.alpha) * wide(x) + self.shift)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
    "l2norm": L2Norm,
    "dyt": DyT,
    "derf": Derf,
}
SITES = ("embed", "attn_in", "query", "key", "attn_mid", "attn_out", "mlp_in", "mlp_mid", "mlp_out", "final")


def norm(config: EquipoiseConfig, site: str, features: int) -> nn.Module | None:
    """The function that the configuration puts at ``site``; None is the identity."""
    if site not in config.sites:
        return None
    settings = dict(config.sites[site])
    return NORMS[settings.pop("function")](features, **settings)


def through(function: nn.Module | None, x: Tensor) -> Tensor:
    """``function(x)``, or x where there is none."""
    return x if function is None else function(x)


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
    """``Wo . attn_mid(attention(query(Wq a), key(Wk a), Wv a))``: causal, with grouped queries."""

    is_causal = True  # what transformers' attention functions ask their caller

    def __init__(self, config: EquipoiseConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q = nn.Linear(width, width, bias=config.bias)
        self.k = nn.Linear(width, kv_width, bias=config.bias)
        self.v = nn.Linear(width, kv_width, bias=config.bias)
        self.out = nn.Linear(width, width, bias=config.bias)
        self.per_head = config.qk_scope == "head"
        self.query = norm(config, "query", config.head_dim if self.per_head else width)
        self.key = norm(config, "key", config.head_dim if self.per_head else kv_width)
        self.attn_mid = norm(config, "attn_mid", width)

    def heads(self, x: Tensor, function: nn.Module | None) -> Tensor:
        """[batch, length, features] -> [batch, heads, length, head width], through the norm."""
        x = x if self.per_head else through(function, x)
        x = x.unflatten(-1, (-1, self.config.head_dim))
        return (through(function, x) if self.per_head else x).transpose(1, 2)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Any, cache: Cache | None) -> Tensor:
        q, k, v = self.heads(self.q(x), self.query), self.heads(self.k(x), self.key), self.heads(self.v(x), None)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, _ = attend(self, q, k, v, mask, scaling=self.config.head_dim**-0.5)
        return self.out(through(self.attn_mid, y.flatten(-2)))


class FeedForward(nn.Module):
    """``W2 . mlp_mid(act(W1 m))``; llama: ``silu(Wgate m) * Wup m`` (arXiv 2002.05202), gpt: GELU's tanh form."""

    def __init__(self, config: EquipoiseConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate = nn.Linear(width, hidden, bias=config.bias) if config.trunk == "llama" else None
        self.up = nn.Linear(width, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, width, bias=config.bias)
        self.mlp_mid = norm(config, "mlp_mid", hidden)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        h = F.gelu(up, approximate="tanh") if self.gate is None else F.silu(self.gate(x)) * up
        return self.down(through(self.mlp_mid, h))


class Block(GradientCheckpointingLayer):
    """``x + attn_out(attention(attn_in(x)))``, then ``x + mlp_out(feedforward(mlp_in(x)))``."""

    def __init__(self, config: EquipoiseConfig, layer: int) -> None:
        super().__init__()
        self.attn_in = norm(config, "attn_in", config.hidden_size)
        self.attention = Attention(config, layer)
        self.attn_out = norm(config, "attn_out", config.hidden_size)
        self.mlp_in = norm(config, "mlp_in", config.hidden_size)
        self.feedforward = FeedForward(config)
        self.mlp_out = norm(config, "mlp_out", config.hidden_size)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Any, past_key_values: Cache | None
    ) -> Tensor:
        a = self.attention(through(self.attn_in, x), rotary, mask, past_key_values)
        x = x + F.dropout(through(self.attn_out, a), self.dropout, self.training)
        m = self.feedforward(through(self.mlp_in, x))
        return x + F.dropout(through(self.mlp_out, m), self.dropout, self.training)


class Transformer(nn.Module):
    """The parameters between tokens and logits. A tied head has none of its own: it is the embedding's."""

    def __init__(self, config: EquipoiseConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width) if config.trunk == "gpt" else None
        self.embedding_scale = nn.Parameter(torch.full((1,), math.sqrt(width))) if config.embedding_scale else None
        self.embed = norm(config, "embed", width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.final = norm(config, "final", width)
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
        self._keep_in_fp32_modules_strict = [rf"\.{site}\." for site in SITES] + [r"\.embedding_scale$"]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # the linears and embeddings
        if isinstance(module, RMSNorm | LayerNorm | DyT | Derf):
            for name, parameter in module.named_parameters(recurse=False):
                init.constant_(parameter, 1.0 if name in ("weight", "alpha") else 0.0)
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
