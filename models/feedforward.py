"""The feed-forward branch: SwiGLU on the llama trunk, GELU on the gpt trunk."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels
from models.config import ModelConfig
from models.plan import NormPlan
from models.weights import build_linear


class FeedForward(nn.Module):
    """``W2 . mlp_mid(act(mlp_act(W1 m)))`` for m [batch, length, width].

    llama: ``silu(mlp_act(Wgate m)) * Wup m`` in place of ``act(…)`` (arXiv 2002.05202); gpt: GELU's tanh form, as GPT-2
    has it.
    """

    fused = False

    def __init__(self, config: ModelConfig, plan: NormPlan) -> None:
        super().__init__()
        hidden = config.feedforward_width
        linear = partial(build_linear, plan.weights, bias=config.bias)
        self.gate = linear(config.width, hidden) if config.trunk == "llama" else None
        self.up = linear(config.width, hidden)
        self.down = linear(hidden, config.width, activation="gelu" if self.gate is None else "swiglu")
        self.mlp_act = plan.build("mlp_act", hidden, config)
        self.mlp_mid = plan.build("mlp_mid", hidden, config)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        z = up if self.gate is None else self.gate(x)
        if self.mlp_act is not None:
            z = self.mlp_act(z)
        if self.gate is None:
            h = F.gelu(z, approximate="tanh")
        else:
            h = kernels.silu_mul(z, up) if self.fused else F.silu(z) * up
        if self.mlp_mid is not None:
            h = self.mlp_mid(h)
        return self.down(h)
