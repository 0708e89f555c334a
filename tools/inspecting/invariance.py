"""What a trained model does when its weights or its input are scaled: the loss, beside what its norms promise.

All weights of one kind, in all blocks, are multiplied by a factor, with their biases, so that what the linear gives is
multiplied by it. Where a norm takes that factor out again before anything bends, the loss cannot change, whatever was
trained; rounding and the norm's epsilon are all that is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn

from models import Transformer
from models.elementwise import Elementwise
from models.weights import SigmaLinear, StandardizedLinear
from tools.inspecting.subject import KINDS, Subject, chunks, mean_loss, weights

FACTORS = (0.5, 0.8, 1.25, 2.0)
INPUT = "input"  # what the embedding gives to the first block or the norm before it, positions included


class Invariance(NamedTuple):
    """``losses`` in nats per target, one for each of FACTORS; ``exact``: the plan makes them all the model's own."""

    kind: str
    exact: bool
    losses: list[float]


class Invariances(NamedTuple):
    loss: float  # of the model as it is
    tokens: int
    rows: list[Invariance]


def look_at_invariance(subject: Subject, progress: Progress) -> Invariances:
    """Over as much of the held-out text as goes through the model at once. The model is left as it was, bit for bit."""
    part = next(chunks(subject.held_out))
    present = {one.kind for one in weights(subject.model)}
    kinds = [kind for kind in KINDS if kind in present] + [INPUT]
    losses: dict[str, list[float]] = {kind: [] for kind in kinds}
    tries = [(kind, factor) for kind in kinds for factor in FACTORS]
    for kind, factor in progress.track(tries, description="invariance"):
        with scaled_by(subject.model, kind, factor):
            losses[kind].append(mean_loss(subject, part))
    exact = promised(subject.model)
    rows = [Invariance(kind, kind in exact, losses[kind]) for kind in kinds]
    return Invariances(mean_loss(subject, part), part.inputs.numel(), rows)


@contextmanager
def scaled_by(model: Transformer, kind: str, factor: float) -> Iterator[None]:
    """Inside the ``with`` all weights of ``kind`` are ``factor`` times as large."""
    changed: list[Tensor] = []
    handles = []
    if kind == INPUT:

        def scale(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return factor * output

        handles.append(model.embedding.register_forward_hook(scale))
        if model.positions is not None:
            changed.append(model.positions.weight)
    else:
        modules = [module for name, module in model.named_modules() if name.split(".")[-1] == kind]
        owned = (module.get_parameter(key) for module in modules for key in ("weight", "bias") if _has(module, key))
        changed += owned
    before = [parameter.detach().clone() for parameter in changed]
    try:
        for parameter in changed:
            parameter.data.mul_(factor)
        yield
    finally:
        for parameter, value in zip(changed, before, strict=True):
            parameter.data.copy_(value)
        for handle in handles:
            handle.remove()


def _has(module: nn.Module, key: str) -> bool:
    return getattr(module, key, None) is not None


def promised(model: Transformer) -> set[str]:
    """The kinds of weights, and ``INPUT``, whose size the model's output does not depend on, by its norms alone."""
    blocks = list(model.blocks)
    found = {kind for kind in ("q", "k", "v", "out", "gate", "up", "down") if all(_exact(b, kind) for b in blocks)}
    if scale_free(model.embed):
        found.add(INPUT)
        if model.positions is None and model.head is not None:
            found.add("embedding")
    return found


def _exact(block: Any, kind: str) -> bool:
    attention, mlp = block.attention, block.feedforward
    linear = {"q": attention.q, "k": attention.k, "v": attention.v, "out": attention.out}.get(kind)
    if linear is None:
        linear = getattr(mlp, kind)
    if linear is None:
        return False
    if isinstance(linear, StandardizedLinear | SigmaLinear):  # takes the factor out of its own weight
        return linear.bias is None
    # attention averages values and the gated activation multiplies by up: what follows a factor passes it on
    attention_end = [attention.attn_mid, attention.out, block.attn_out]
    mlp_end = [mlp.mlp_mid, mlp.down, block.mlp_out]
    after = {
        "q": [attention.query],
        "k": [attention.key],
        "v": [attention.value, *attention_end],
        "out": [block.attn_out],
        "gate": [mlp.mlp_act],
        "up": [mlp.mlp_act] if mlp.gate is None else mlp_end,
        "down": [block.mlp_out],
    }[kind]
    for module in after:
        if scale_free(module):
            return True
        if module is not None and not (isinstance(module, nn.Linear) and module.bias is None):
            return False
    return False


def scale_free(norm: nn.Module | None) -> bool:
    """Whether ``norm`` gives the same for an input of any size. It is tried, so that it holds for a reader's own."""
    if norm is None or isinstance(norm, nn.Linear | Elementwise):
        return False
    gain = getattr(norm, "weight", None)
    features = 64 if gain is None or gain.numel() == 1 else gain.numel()
    device = next((p.device for p in norm.parameters()), torch.device("cpu"))
    x = torch.randn(4, features, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        return torch.allclose(norm(2 * x), norm(x), rtol=1e-4, atol=1e-6)
