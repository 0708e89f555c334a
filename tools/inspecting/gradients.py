"""The gradient's distribution, weight by weight, in measures that no change of scale touches; and its noise.

Gradients are of the training objective (z-loss included, dropout not), a sequence at a time::

    g_i = N * (gradient of sequence i's summed loss) / (all targets),    so that  G = mean g_i  is the whole batch's

A histogram of |G| says how large a gradient is; only what is divided by its own scale says how heavy its tail is. The
literature on heavy tails (arXiv 1912.03194) is about the noise ``g_i - G``, so both are measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from models.loss import IGNORE
from pretrain.batch import Batch
from pretrain.telemetry.noise import noise_scale
from pretrain.telemetry.statistics import kurtosis, moments, sample, tail
from tools.inspecting.subject import Subject, Weight, rows_of, weights

_TAIL_SAMPLE = 2**22  # elements of one weight
LEVELS = [10 ** (-place / 10) for place in range(2, 46)]  # shares of elements that lie beyond a quantile


class WeightTails(NamedTuple):
    """One weight's mean gradient G. ``quantiles``: of |G| / RMS(G), which a share LEVELS of its elements exceeds, as
    far as it has enough of them. ``noise_kurtosis``: of the elements of all g_i - G. Of an embedding the rows of tokens
    that did not occur, whose gradient is exactly 0, are left out of all but the noise."""

    name: str
    kind: str
    block: int | None
    rms: float
    kurtosis: float
    hill: float
    ratio: float
    noise_kurtosis: float
    quantiles: list[float]


class BatchNoise(NamedTuple):
    """The gradient noise scale in tokens, and its standard error by the jackknife over sequences. NaN: so few
    sequences do not tell the gradient from its noise. An infinite error: nor would they with one of them less."""

    scale: float
    error: float
    gradient_squared: float  # |G|^2 of the true gradient
    trace: float  # of the covariance of one sequence's gradient


class Gradients(NamedTuple):
    """``norms``: |g_i - G| over all parameters, a number a sequence."""

    weights: list[WeightTails]
    norms: list[float]
    noise: BatchNoise
    tokens: int


def look_at_gradients(subject: Subject, progress: Progress) -> Gradients:
    """Two passes over the training sequences: the mean, and then what each differs from it, so that no more than two
    gradients are held at a time."""
    batch = subject.training
    count = len(batch.inputs)
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    squared = torch.zeros(count, dtype=torch.float64)
    for i in progress.track(range(count), description="gradients"):
        for add, own in zip(total, _gradient(subject, batch, i, parameters), strict=True):
            add += own / count
            squared[i] += own.double().square().sum().cpu()
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    looked = [(one, places[id(one.parameter)]) for one in weights(subject.model)]
    noise = [torch.zeros(5, dtype=torch.float64, device=p.device) for p in parameters]
    inner = torch.zeros(count, dtype=torch.float64)
    norms = torch.zeros(count, dtype=torch.float64)
    for i in progress.track(range(count), description="gradient noise"):
        for place, own in enumerate(_gradient(subject, batch, i, parameters)):
            inner[i] += (own.double() * total[place]).sum().cpu()
            difference = own - total[place]
            noise[place] += moments(difference)
            norms[i] += difference.double().square().sum().cpu()
    tails = [weight_tails(one, total[place], noise[place]) for one, place in looked]
    whole = sum(g.double().square().sum() for g in total)
    assert isinstance(whole, Tensor)
    return Gradients(
        tails,
        norms.sqrt().tolist(),
        batch_noise(squared, inner, whole.cpu(), subject.length),
        batch.inputs.numel(),
    )


def weight_tails(weight: Weight, gradient: Tensor, noise: Tensor) -> WeightTails:
    """``noise``: the ``moments`` of all g_i - G."""
    if weight.kind == "embedding":
        gradient = gradient[gradient.ne(0).any(dim=1)]
    magnitudes = sample(gradient, _TAIL_SAMPLE)
    hill, ratio = tail(magnitudes)
    rms = gradient.double().square().mean().sqrt().item()
    ordered = magnitudes.sort(descending=True).values.cpu()
    reached = [level for level in LEVELS if level * len(ordered) >= 1]
    quantiles = [ordered[math.ceil(level * len(ordered)) - 1].item() / rms for level in reached] if rms > 0 else []
    return WeightTails(
        weight.name,
        weight.kind,
        weight.block,
        rms,
        kurtosis(moments(gradient)).item(),
        hill.item(),
        ratio.item(),
        kurtosis(noise).item(),
        quantiles,
    )


def batch_noise(squared: Tensor, inner: Tensor, whole: Tensor, length: int) -> BatchNoise:
    """From |g_i|^2 and g_i . G, fp64 [sequences], and |G|^2 of their mean.

    ``noise_scale`` with one sequence as the small batch and all as the big one. The mean without sequence i is
    ``(N G - g_i) / (N - 1)``, whose squared norm follows from the three.
    """
    count = len(squared)

    def estimate(small: Tensor, big: Tensor, sequences: int) -> tuple[float, float, float]:
        found = noise_scale(small, torch.tensor(1.0).double(), big, torch.tensor(float(sequences)).double())
        return found.scale.item() * length, found.gradient_squared.item(), found.covariance_trace.item()

    scale, gradient, trace = estimate(squared.mean(), whole, count)
    without = (count**2 * whole - 2 * count * inner + squared) / (count - 1) ** 2
    means = (squared.sum() - squared) / (count - 1)
    error = math.nan
    if count > 2:
        parts = torch.tensor([estimate(*of, count - 1)[0] for of in zip(means, without, strict=True)]).double()
        error = ((count - 1) / count * (parts - parts.mean()).square().sum()).sqrt().nan_to_num(math.inf).item()
    return BatchNoise(scale, error, gradient, trace)


def _gradient(subject: Subject, batch: Batch, i: int, parameters: list[torch.nn.Parameter]) -> tuple[Tensor, ...]:
    """g_i, one tensor a parameter; zeros where the loss does not depend on it."""
    part = rows_of(batch, slice(i, i + 1))
    config = subject.config.train
    objective = subject.model(*part, z_loss=config.z_loss, loss_chunk=config.loss_chunk)[0]
    objective = objective * (len(batch.inputs) / int(batch.targets.ne(IGNORE).sum()))
    return torch.autograd.grad(objective, parameters, materialize_grads=True)
