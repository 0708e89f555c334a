"""The linears of a model, and the model with some of them rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Transformer
from tools.quantizing.formats import Treatment

HEAD = "head"


def linears(model: Transformer) -> dict[str, nn.Linear]:
    """The blocks' linears by their names, ``blocks.0.attention.q`` …, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }


def place(name: str) -> tuple[int, str]:
    """(block, kind) of a linear's name: (0, "q")."""
    _, block, *_, kind = name.split(".")
    return int(block), kind


@torch.no_grad()
def effective_weight(linear: nn.Linear) -> Tensor:
    """The matrix [out, in] that multiplies: of one that makes it of its parameters, what it does to the identity."""
    if type(linear) is nn.Linear:
        return linear.weight
    identity = torch.eye(linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)
    unbiased = {} if linear.bias is None else {"bias": torch.zeros_like(linear.bias)}
    columns: Tensor = torch.func.functional_call(linear, unbiased, identity)
    return columns.T


class RoundedLinear(nn.Module):
    """``x W^T + b`` with W, and x if the treatment has it so, at the values of a format; the product is fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, treatment: Treatment) -> None:
        super().__init__()
        self.weight = nn.Parameter(treatment.round(weight.detach()), requires_grad=False)
        self.bias = bias
        self.treatment = treatment

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.treatment.round(x) if self.treatment.activations else x, self.weight, self.bias)


@contextmanager
def rounded(model: Transformer, treated: Mapping[str, Treatment]) -> Iterator[None]:
    """``model`` with these linears rounded; ``head`` is one of the names. Afterwards it has its own again.

    A head that is tied to the embedding is rounded apart from it: the embedding is looked up in fp32.
    """
    own = linears(model)
    with ExitStack() as restoring:
        for name, treatment in treated.items():
            if name == HEAD:
                _round_head(model, treatment, restoring)
                continue
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            linear = own[name]
            restoring.callback(setattr, module, leaf, linear)
            setattr(module, leaf, RoundedLinear(effective_weight(linear), linear.bias, treatment))
        yield


def _round_head(model: Transformer, treatment: Treatment, restoring: ExitStack) -> None:
    head = model.head
    weight = model.embedding.weight if head is None else head.weight
    restoring.callback(setattr, model, HEAD, head)
    # The loss reads the head's weight and does not call it, so its input is rounded where that is made.
    model.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    model.head.weight = nn.Parameter(treatment.round(weight.detach()), requires_grad=False)
    if treatment.activations:
        last = model.blocks[-1] if model.final is None else model.final
        hook = last.register_forward_hook(lambda _, __, output: treatment.round(output))
        restoring.callback(hook.remove)
