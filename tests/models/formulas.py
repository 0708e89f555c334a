"""The pieces of which reference models are written: fp64, by the papers' formulas, without the code under test."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models import ModelConfig

Parameters = dict[str, Tensor]
Reference = Callable[["Formulas", Tensor, str], Tensor]


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)


class Formulas:
    def __init__(self, config: ModelConfig, parameters: Parameters) -> None:
        self.config, self.p = config, parameters

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms(x, self.p[f"{name}.weight"], self.config.norm_eps)

    def dyt(self, x: Tensor, name: str) -> Tensor:
        return self.p[f"{name}.weight"] * torch.tanh(self.p[f"{name}.alpha"] * x)

    def w(self, x: Tensor, name: str) -> Tensor:
        return torch.einsum("oi,bli->blo", self.p[f"{name}.weight"], x)

    def qkv(self, h: Tensor, block: str, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [batch, length, heads, head width]; norm is none, head, qkv (of v too) or projection."""
        q, k, v = (self.w(h, f"{block}.attention.{part}") for part in "qkv")
        if norm == "projection":
            q, k = self.norm(q, f"{block}.attention.query"), self.norm(k, f"{block}.attention.key")
        q, k, v = (t.reshape(*t.shape[:2], -1, self.config.head_width) for t in (q, k, v))
        if norm == "qkv":
            v = self.norm(v, f"{block}.attention.value")
        if norm in ("head", "qkv"):
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

    def hidden(self, m: Tensor, block: str, act_shift: Tensor | float = 0.0) -> Tensor:
        up = self.w(m, f"{block}.feedforward.up")
        if self.config.trunk == "gpt":  # GELU, tanh form
            z = up + act_shift
            return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        gate = self.w(m, f"{block}.feedforward.gate") + act_shift
        return gate / (1 + torch.exp(-gate)) * up

    def out(self, y: Tensor, block: str) -> Tensor:
        return self.w(y, f"{block}.attention.out")

    def down(self, y: Tensor, block: str) -> Tensor:
        return self.w(y, f"{block}.feedforward.down")
