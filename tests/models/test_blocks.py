"""Whole models against plain fp64 re-implementations, written from the papers' formulas without the code under test.

On the gpt trunk the two agree to fp64 rounding. On the llama trunk the rotary angles are fp32 by design: at 16
positions an angle is off by up to 16 * 2^-24 = 1e-6, and so, within a small factor, are the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models import ModelConfig
from tests.models.building import scrambled, tiny, tokens

Parameters = dict[str, Tensor]
Reference = Callable[["Formulas", Tensor, str], Tensor]


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)


class Formulas:
    """The pieces of which the block formulas below are written."""

    def __init__(self, config: ModelConfig, parameters: Parameters) -> None:
        self.config, self.p = config, parameters

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms(x, self.p[f"{name}.weight"], self.config.norm_eps)

    def dyt(self, x: Tensor, name: str) -> Tensor:
        return self.p[f"{name}.weight"] * torch.tanh(self.p[f"{name}.alpha"] * x)

    def w(self, x: Tensor, name: str) -> Tensor:
        return torch.einsum("oi,bli->blo", self.p[f"{name}.weight"], x)

    def qkv(self, h: Tensor, block: str, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [batch, length, heads, head width]; norm is none, head or projection."""
        q, k, v = (self.w(h, f"{block}.attention.{part}") for part in "qkv")
        if norm == "projection":
            q, k = self.norm(q, f"{block}.attention.query"), self.norm(k, f"{block}.attention.key")
        q, k, v = (t.reshape(*t.shape[:2], -1, self.config.head_width) for t in (q, k, v))
        if norm == "head":
            q, k = self.norm(q, f"{block}.attention.query"), self.norm(k, f"{block}.attention.key")
        return q, k, v

    def rope(self, x: Tensor) -> Tensor:
        """Features i and i + h/2 are a complex number, turned by position * theta^(-2 i / h)."""
        half = x.shape[-1] // 2
        z = torch.complex(x[..., :half], x[..., half:])
        for position in range(x.shape[1]):
            for i in range(half):
                angle = position * self.config.rope_theta ** (-i / half)
                z[:, position, :, i] *= complex(math.cos(angle), math.sin(angle))
        return torch.cat((z.real, z.imag), dim=-1)

    def attention(self, h: Tensor, block: str, norm: str = "none") -> Tensor:
        """concat_heads softmax(q^T k / sqrt(h)) v, before Wo."""
        q, k, v = self.qkv(h, block, norm)
        if self.config.trunk == "llama":
            q, k = self.rope(q), self.rope(k)
        out = torch.zeros_like(q)
        group = q.shape[2] // k.shape[2]
        for t in range(h.shape[1]):
            for head in range(q.shape[2]):
                past = k[:, : t + 1, head // group]
                scores = torch.einsum("bd,bsd->bs", q[:, t, head], past) / math.sqrt(q.shape[-1])
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                out[:, t, head] = torch.einsum("bs,bsd->bd", weights, v[:, : t + 1, head // group])
        return out.flatten(2)

    def hidden(self, m: Tensor, block: str) -> Tensor:
        up = self.w(m, f"{block}.feedforward.up")
        if self.config.trunk == "gpt":  # GELU, tanh form
            return 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        gate = self.w(m, f"{block}.feedforward.gate")
        return gate / (1 + torch.exp(-gate)) * up

    def out(self, y: Tensor, block: str) -> Tensor:
        return self.w(y, f"{block}.attention.out")

    def down(self, y: Tensor, block: str) -> Tensor:
        return self.w(y, f"{block}.feedforward.down")


def dnt(f: Formulas, x: Tensor, b: str) -> Tensor:
    """S5: x + MidNorm(Wo attention(QKNorm(W PreNorm(x)))), then x + MidNorm(W2 act(W1 x))."""
    h = f.norm(x, f"{b}.attn_in")
    x = x + f.norm(f.out(f.attention(h, b, "head"), b), f"{b}.attn_out")
    return x + f.norm(f.down(f.hidden(x, b), b), f"{b}.mlp_out")


def dnt_s4(f: Formulas, x: Tensor, b: str) -> Tensor:
    """S4: the feed-forward reads PreNorm(x)."""
    h = f.norm(x, f"{b}.attn_in")
    x = x + f.norm(f.out(f.attention(h, b, "head"), b), f"{b}.attn_out")
    return x + f.norm(f.down(f.hidden(f.norm(x, f"{b}.mlp_in"), b), b), f"{b}.mlp_out")


def peri(f: Formulas, x: Tensor, b: str) -> Tensor:
    """x + N(f(N(x))) for both branches."""
    x = x + f.norm(f.out(f.attention(f.norm(x, f"{b}.attn_in"), b), b), f"{b}.attn_out")
    return x + f.norm(f.down(f.hidden(f.norm(x, f"{b}.mlp_in"), b), b), f"{b}.mlp_out")


def olmo2(f: Formulas, x: Tensor, b: str) -> Tensor:
    """x + N(f(x)), with query and key norms over all heads together."""
    x = x + f.norm(f.out(f.attention(x, b, "projection"), b), f"{b}.attn_out")
    return x + f.norm(f.down(f.hidden(x, b), b), f"{b}.mlp_out")


def sub_ln(f: Formulas, x: Tensor, b: str) -> Tensor:
    """Pre-norm, and a second norm before each output projection."""
    mid = f.norm(f.attention(f.norm(x, f"{b}.attn_in"), b), f"{b}.attention.attn_mid")
    x = x + f.out(mid, b)
    return x + f.down(f.norm(f.hidden(f.norm(x, f"{b}.mlp_in"), b), f"{b}.feedforward.mlp_mid"), b)


def dyt(f: Formulas, x: Tensor, b: str) -> Tensor:
    """Pre-norm LLaMA with gain * tanh(alpha x) for each RMSNorm."""
    x = x + f.out(f.attention(f.dyt(x, f"{b}.attn_in"), b), b)
    return x + f.down(f.hidden(f.dyt(x, f"{b}.mlp_in"), b), b)


# plan -> block, norm of the embedding, of the end, embedding scale
REFERENCES: dict[str, tuple[Reference, bool, str, bool]] = {
    "dnt": (dnt, True, "norm", False),
    "dnt-s4": (dnt_s4, True, "norm", False),
    "peri": (peri, True, "norm", False),
    "olmo2": (olmo2, False, "norm", False),
    "sub-ln": (sub_ln, False, "norm", False),
    "dyt": (dyt, False, "dyt", True),
}


def reference_logits(config: ModelConfig, p: Parameters, ids: Tensor) -> Tensor:
    block, embed_norm, final, scale = REFERENCES[config.plan]
    f = Formulas(config, p)
    x = p["embedding.weight"][ids]
    if config.trunk == "gpt":
        x = x + p["positions.weight"][: ids.shape[1]]
    if scale:
        x = x * p["embedding_scale"]
    if embed_norm:
        x = f.norm(x, "embed")
    for i in range(config.depth):
        x = block(f, x, f"blocks.{i}")
    x = f.norm(x, "final") if final == "norm" else f.dyt(x, "final")
    return x @ p["embedding.weight" if config.is_tied else "head.weight"].T


@pytest.mark.parametrize("trunk", ["llama", "gpt"])
@pytest.mark.parametrize("plan", REFERENCES)
@torch.no_grad()
def test_model_is_its_formula(plan: str, trunk: str) -> None:
    config = tiny(plan=plan, trunk=trunk, kv_heads=2, norm_eps=1e-2)
    model = scrambled(config, dtype=torch.float64)
    expected = reference_logits(config, dict(model.named_parameters()), tokens())
    tolerance = 1e-5 if trunk == "llama" else 1e-12
    torch.testing.assert_close(model(tokens()), expected, atol=tolerance, rtol=tolerance)


def test_dnt_is_free_of_its_weights_scale() -> None:
    """Wo, Wv, W2, and Wq, Wk per head stand before a norm: ten times larger, they change nothing (eps aside)."""
    config = tiny(plan="dnt", norm_eps=1e-12)
    model = scrambled(config, dtype=torch.float64)
    before = model(tokens())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q.weight", "k.weight", "v.weight", "out.weight", "down.weight")) and parameter.ndim == 2:
                parameter.mul_(10)
    torch.testing.assert_close(model(tokens()), before, atol=1e-8, rtol=1e-8)
