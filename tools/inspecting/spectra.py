"""Singular values: of every weight, and of what queries and keys make of their weights together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn

from models.attention import Attention
from tools.inspecting.subject import Subject, weights


class Spectrum(NamedTuple):
    """``values`` fp32 [min(shape)], descending, on the CPU."""

    name: str
    kind: str
    block: int | None
    shape: tuple[int, int]
    values: Tensor

    @property
    def stable_rank(self) -> float:
        """``|W|_F^2 / |W|_2^2``, at most the rank."""
        return (self.values.double().square().sum() / self.values[0].double().square()).item()

    @property
    def condition(self) -> float:
        """Largest over smallest; infinite where a direction is lost."""
        smallest = self.values[-1].item()
        return self.values[0].item() / smallest if smallest > 0 else math.inf


class Scores(NamedTuple):
    """``sigma`` fp32 [heads, head width]: singular values of ``W_q^T W_k`` of each head of one block, descending."""

    block: int
    sigma: Tensor


class Spectra(NamedTuple):
    weights: list[Spectrum]
    scores: list[Scores]
    normalized: bool  # query and key norms stand behind the weights, so that scores do not follow their size


@torch.no_grad()
def look_at_spectra(subject: Subject, progress: Progress) -> Spectra:
    """Of the weights that multiply: a standardized one after it is standardized."""
    found = []
    modules = dict(subject.model.named_modules())
    for one in progress.track(weights(subject.model), description="singular values"):
        matrix = effective_weight(modules[one.name.rpartition(".")[0]])
        values = torch.linalg.svdvals(matrix).cpu()
        found.append(Spectrum(one.name, one.kind, one.block, (matrix.shape[0], matrix.shape[1]), values))
    attentions = [module for module in modules.values() if isinstance(module, Attention)]
    scores = [Scores(index, score_values(attention)) for index, attention in enumerate(attentions)]
    normalized = all(None not in (attention.query, attention.key) for attention in attentions)
    return Spectra(found, scores, normalized)


def effective_weight(module: nn.Module) -> Tensor:
    """What ``module`` multiplies by, [out, in], whatever it makes of its parameters (models/weights.py)."""
    weight = module.get_parameter("weight")
    if type(module) in (nn.Linear, nn.Embedding):
        return weight
    columns = torch.eye(weight.shape[1], device=weight.device)
    return (module(columns) - module(torch.zeros_like(columns))).mT


def score_values(attention: Attention) -> Tensor:
    """Singular values of ``W_q^T W_k`` [width, width] of each head, fp32 [heads, head width].

    A head's key weight is its group's. The rank is at most the head's width, so only the small ``R_q R_k^T`` of
    ``W_q^T = Q_q R_q`` and ``W_k^T = Q_k R_k`` is decomposed.
    """
    width = attention.head_width
    queries = effective_weight(attention.q).unflatten(0, (-1, width))
    keys = effective_weight(attention.k).unflatten(0, (-1, width))
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    factors = [torch.linalg.qr(part.mT, mode="r").R for part in (queries, keys)]
    return torch.linalg.svdvals(factors[0] @ factors[1].mT).cpu()
