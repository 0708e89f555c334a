"""Whole models against plain fp64 re-implementations, written from the papers' formulas without the code under test.

On the gpt trunk the two agree to fp64 rounding. On the llama trunk the rotary angles are fp32 by design: at 16
positions an angle is off by up to 16 * 2^-24 = 1e-6, and so, within a small factor, are the logits.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import ModelConfig
from tests.models.building import scrambled, tiny, tokens
from tests.models.formulas import Formulas, Parameters, Reference


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


def sandwich(f: Formulas, x: Tensor, b: str) -> Tensor:
    """As Peri-LN: x + N(f(N(x)))."""
    return peri(f, x, b)


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
    "sandwich": (sandwich, False, "norm", False),
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
