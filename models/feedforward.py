"""The feed-forward branch: SwiGLU on the llama trunk, GELU on the gpt trunk."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.plan import NormPlan


class FeedForward(nn.Module):
    """``W2 . mlp_mid(act(W1 m))`` for m [batch, length, width].

    llama: ``act(W1 m) = silu(Wgate m) * Wup m`` (arXiv 2002.05202); gpt: GELU's tanh form, as GPT-2 has it.
    """

    def __init__(self, config: ModelConfig, plan: NormPlan) -> None:
        super().__init__()
        hidden = config.feedforward_width
        self.gate = nn.Linear(config.width, hidden, bias=config.bias) if config.trunk == "llama" else None
        self.up = nn.Linear(config.width, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.width, bias=config.bias)
        self.mlp_mid = plan.build("mlp_mid", hidden, config)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        h = F.gelu(up, approximate="tanh") if self.gate is None else F.silu(self.gate(x)) * up
        if self.mlp_mid is not None:
            h = self.mlp_mid(h)
        return self.down(h)
