"""The baselines of the literature, whole models against fp64 re-implementations (formulas.py), block by block.

The tolerances are those of test_blocks.py: rotary angles are fp32 by design, all else agrees to fp64 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models import ModelConfig
from models.config import ResidualConfig
from tests.models.building import scrambled, tiny, tokens
from tests.models.formulas import Formulas, Parameters

Block = Callable[[Formulas, Tensor, int], Tensor]


def attn(f: Formulas, h: Tensor, b: str, norm: str = "none") -> Tensor:
    return f.out(f.attention(h, b, norm), b)


def mlp(f: Formulas, m: Tensor, b: str) -> Tensor:
    return f.down(f.hidden(m, b), b)


def pre(f: Formulas, x: Tensor, i: int) -> Tensor:
    b = f"blocks.{i}"
    x = x + attn(f, f.norm(x, f"{b}.attn_in"), b)
    return x + mlp(f, f.norm(x, f"{b}.mlp_in"), b)


def post(f: Formulas, x: Tensor, i: int, alpha: float = 1.0) -> Tensor:
    """N(alpha x + f(x)) for both branches."""
    b = f"blocks.{i}"
    x = f.norm(alpha * x + attn(f, x, b), f"{b}.attn_post")
    return f.norm(alpha * x + mlp(f, x, b), f"{b}.mlp_post")


def deepnorm(f: Formulas, x: Tensor, i: int) -> Tensor:
    return post(f, x, i, alpha=(2 * f.config.depth) ** 0.25)


def mix_ln(f: Formulas, x: Tensor, i: int) -> Tensor:
    """Of four blocks the first is post-norm."""
    return post(f, x, i) if i < 1 else pre(f, x, i)


def hybridnorm(f: Formulas, x: Tensor, i: int) -> Tensor:
    """y = x + attention with norms of q, k and v; z = N(y); z + FFN(z)."""
    b = f"blocks.{i}"
    z = f.norm(x + attn(f, x, b, "qkv"), f"{b}.attn_post")
    return z + mlp(f, z, b)


def hybridnorm_star(f: Formulas, x: Tensor, i: int) -> Tensor:
    """The first block: pre-norm of both branches, and the norms of q, k and v."""
    if i > 0:
        return hybridnorm(f, x, i)
    b = f"blocks.{i}"
    x = x + attn(f, f.norm(x, f"{b}.attn_in"), b, "qkv")
    return x + mlp(f, f.norm(x, f"{b}.mlp_in"), b)


def plain(f: Formulas, x: Tensor, i: int) -> Tensor:
    b = f"blocks.{i}"
    x = x + attn(f, x, b)
    return x + mlp(f, x, b)


def rezero(f: Formulas, x: Tensor, i: int) -> Tensor:
    b, a = f"blocks.{i}", f.p[f"blocks.{i}.residual.both"]
    x = x + a * attn(f, x, b)
    return x + a * mlp(f, x, b)


def skipinit(f: Formulas, x: Tensor, i: int) -> Tensor:
    b = f"blocks.{i}"
    x = x + f.p[f"{b}.residual.attn"] * attn(f, x, b)
    return x + f.p[f"{b}.residual.mlp"] * mlp(f, x, b)


def fixup(f: Formulas, x: Tensor, i: int) -> Tensor:
    """Shifts before attention, both linears and the activation; a gain at each branch's end."""
    b = f"blocks.{i}"
    x = x + f.p[f"{b}.residual.attn"] * attn(f, x + f.p[f"{b}.attn_in.shift"], b)
    m = f.hidden(x + f.p[f"{b}.mlp_in.shift"], b, f.p[f"{b}.feedforward.mlp_act.shift"])
    return x + f.p[f"{b}.residual.mlp"] * f.down(m + f.p[f"{b}.feedforward.mlp_mid.shift"], b)


def nf(f: Formulas, x: Tensor, i: int, alpha: float = 0.2) -> Tensor:
    """x + alpha s f(x / beta_i), beta_i = sqrt(v_i), v_0 = 1, v_{i+1} = v_i + alpha^2 from branch to branch."""
    b, variance = f"blocks.{i}", 1.0
    for _ in range(2 * i):
        variance += alpha**2
    x = x + alpha * f.p[f"{b}.residual.attn"] * attn(f, x / math.sqrt(variance), b)
    variance += alpha**2
    return x + alpha * f.p[f"{b}.residual.mlp"] * mlp(f, x / math.sqrt(variance), b)


def scaled(f: Formulas, x: Tensor, i: int) -> Tensor:
    b, c = f"blocks.{i}", 1 / math.sqrt(2 * f.config.depth)
    x = x + c * attn(f, x, b)
    return x + c * mlp(f, x, b)


class Standardized(Formulas):
    """W_ij -> gamma gain_i (W_ij - mean_i) / (sigma_i sqrt(N)); gamma before the last linear is 1 / the spread of what
    the activation makes of standard normal numbers, here by a sum over a fine grid."""

    def w(self, x: Tensor, name: str) -> Tensor:
        weight = self.p[f"{name}.weight"]
        centered = weight - weight.sum(1, keepdim=True) / weight.shape[1]
        sigma = torch.sqrt((centered**2).sum(1, keepdim=True) / weight.shape[1])
        weight = self.p[f"{name}.gain"][:, None] * centered / (sigma * math.sqrt(weight.shape[1]))
        return self.gamma(name) * torch.einsum("oi,bli->blo", weight, x)

    def gamma(self, name: str) -> float:
        if not name.endswith("down"):
            return 1.0
        z = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
        density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * 1e-4
        if self.config.trunk == "gpt":
            gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            return float(1 / math.sqrt((gelu**2 * density).sum() - (gelu * density).sum() ** 2))
        silu = z / (1 + torch.exp(-z))
        return float(1 / math.sqrt((silu**2 * density).sum()))


class Sigma(Formulas):
    """W -> gamma / sigma(W) W with the exact largest singular value."""

    def w(self, x: Tensor, name: str) -> Tensor:
        weight = self.p[f"{name}.weight"]
        weight = self.p[f"{name}.gain"] * weight / torch.linalg.svdvals(weight)[0]
        return torch.einsum("oi,bli->blo", weight, x)


# plan -> block, final (norm, shift or nothing), whether the embedding has a scale, what its linears are
REFERENCES: dict[str, tuple[Block, str, bool, type[Formulas]]] = {
    "post": (post, "", False, Formulas),
    "deepnorm": (deepnorm, "", True, Formulas),
    "mix-ln": (mix_ln, "norm", False, Formulas),
    "hybridnorm": (hybridnorm, "norm", False, Formulas),
    "hybridnorm-star": (hybridnorm_star, "norm", False, Formulas),
    "none": (plain, "", False, Formulas),
    "rezero": (rezero, "", True, Formulas),
    "skipinit": (skipinit, "", True, Formulas),
    "fixup": (fixup, "shift", True, Formulas),
    "t-fixup": (plain, "", True, Formulas),
    "nf": (nf, "", True, Standardized),
    "sigma-reparam": (plain, "", True, Sigma),
}


def reference_logits(config: ModelConfig, p: Parameters, ids: Tensor, plan: str) -> Tensor:
    block, final, scale, formulas = REFERENCES[plan]
    f = formulas(config, p)
    x = p["embedding.weight"][ids]
    if config.trunk == "gpt":
        x = x + p["positions.weight"][: ids.shape[1]]
    if scale:
        x = x * p["embedding_scale"]
    for i in range(config.depth):
        x = block(f, x, i)
    if final == "norm":
        x = f.norm(x, "final")
    if final == "shift":
        x = x + p["final.shift"]
    return x @ p["embedding.weight" if config.is_tied else "head.weight"].T


def outlier(model: torch.nn.Module) -> None:
    """A largest singular value that stands out, where power iteration is exact (test_weights.py tests where not)."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            u, v = (torch.randn(size, generator=generator, dtype=torch.float64) for size in parameter.shape)
            parameter.add_(torch.outer(u, v) * 6 / math.sqrt(parameter.numel()))


@pytest.mark.parametrize("trunk", ["llama", "gpt"])
@pytest.mark.parametrize("plan", REFERENCES)
@torch.no_grad()
def test_model_is_its_formula(plan: str, trunk: str) -> None:
    config = tiny(plan=plan, trunk=trunk, kv_heads=2, norm_eps=1e-2, depth=4 if plan in ("mix-ln", "nf") else 2)
    model = scrambled(config, dtype=torch.float64)
    tolerance = 1e-5 if trunk == "llama" else 1e-11
    if plan == "sigma-reparam":
        outlier(model)
        tolerance = 1e-5  # the second singular value is about a third of the first, and 3^-16 is 2e-8
    if plan == "nf":
        tolerance = 1e-4  # gamma is a constant of six digits
    expected = reference_logits(config, dict(model.named_parameters()), tokens(), plan)
    assert expected.std() > 0.1, "nothing to compare"
    torch.testing.assert_close(model(tokens()), expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_a_scheme_of_the_readers_own_choice() -> None:
    """scaled, which no plan has: a fixed factor on each branch."""
    config = tiny(plan="none", trunk="gpt", residual=ResidualConfig(scheme="scaled"))
    model = scrambled(config, dtype=torch.float64)
    f = Formulas(config, dict(model.named_parameters()))
    x = f.p["embedding.weight"][tokens()] + f.p["positions.weight"]
    for i in range(config.depth):
        x = scaled(f, x, i)
    torch.testing.assert_close(model(tokens()), x @ f.p["embedding.weight"].T, atol=1e-12, rtol=1e-12)
