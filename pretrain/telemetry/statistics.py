"""Figures that say what shape a distribution has, of gradients and activations alike.

All but ``over`` are free of scale: multiplied by a constant, a tensor keeps them. A histogram of magnitudes does not,
so that ten times smaller gradients are no evidence of lighter tails. Nothing here waits for the device.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE = 2**16  # elements that quantiles and the Hill index are taken from
_TAIL = 0.01  # share of the sample that the Hill index looks at
_CHUNK = 2**22  # elements that are widened to fp64 at a time: 32 MiB, and as much for each power


def moments(x: Tensor) -> Tensor:
    """fp64 [5]: the count of ``x`` and the sums of its first four powers. Those of two parts add up to the whole's."""
    flat = x.detach().reshape(-1)
    total = torch.zeros(5, dtype=torch.float64, device=x.device)
    total[0] = flat.numel()
    for chunk in flat.split(_CHUNK):
        wide = chunk.double()
        square = wide * wide
        total[1:] += torch.stack([wide.sum(), square.sum(), square.dot(wide), square.dot(square)])
    return total


def kurtosis(of: Tensor) -> Tensor:
    """E(x - m)^4 / var^2, fp64, of ``moments`` [..., 5]: 3 for a Gaussian, NaN where next to nothing varies."""
    mean, second, third, fourth = (of[..., 1:] / of[..., :1]).unbind(-1)
    variance = second - mean**2
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    # With a mean of 1000 deviations, rounding of the fourth moment is 1e-4 of the central one; beyond, it is all of it.
    return torch.where(variance > 1e-6 * second, central / variance**2, torch.nan)


def stride(shape: torch.Size, size: int = SAMPLE) -> int:
    """Every so-manieth element of a tensor of this ``shape`` makes a sample of at most ``size``.

    It has no factor in common with the length of a row. One that had would take the same few columns from every row,
    and features differ in scale.
    """
    row = shape[-1] if shape else 1
    step = max(1, -(-shape.numel() // size))
    while gcd(step, row) > 1:
        step += 1
    return step


def sample(x: Tensor, size: int = SAMPLE) -> Tensor:
    """Magnitudes of elements spread evenly over ``x`` and its columns, at most ``size`` of them, fp32."""
    return x.detach().reshape(-1)[:: stride(x.shape, size)].float().abs()


class Tail(NamedTuple):
    """How heavy a tail is, fp32 []; NaN where a sample has nothing to say."""

    hill: Tensor  # index of a power law: P(|x| > t) ~ t^-hill. Smaller is heavier; below 4 there is no kurtosis
    ratio: Tensor  # quantile 99.9 % over the median: 4.9 for a Gaussian


def tail(magnitudes: Tensor) -> Tail:
    """Of a ``sample``: the Hill index (Ann. Statist. 3, 1975) of its largest hundredth, and the ratio of quantiles."""
    count = magnitudes.numel()
    nan = torch.full((), torch.nan, device=magnitudes.device)
    if count < 2:
        return Tail(nan, nan)
    largest = max(1, int(count * _TAIL))
    top = magnitudes.topk(largest + 1).values  # NaN counts as the largest, so that none is overlooked
    hill = (top[:-1] / top[-1]).log().mean().reciprocal()
    ratio = top[int(count * 0.001)] / magnitudes.median()
    # A threshold of 0 makes the index 0, which is no finding: more than 99 % of the sample is 0.
    return Tail(torch.where(hill.isfinite() & (top[-1] > 0), hill, nan), torch.where(ratio.isfinite(), ratio, nan))


class Outliers(NamedTuple):
    """Of activations [..., features], fp32 []."""

    over: Tensor  # features with a magnitude above 6 somewhere: LLM.int8()'s outliers (arXiv 2208.07339)
    kurtosis: Tensor  # over features and tokens
    ratio: Tensor  # largest magnitude over the median one


def outliers(x: Tensor, threshold: float = 6.0) -> Outliers:
    """Of ``x`` [..., features], in which a feature has a value for every token."""
    features = x.detach().flatten(0, -2).float()
    magnitudes = features.abs()
    return Outliers(
        (magnitudes.amax(0) > threshold).sum().float(),
        kurtosis(moments(features)).float(),
        magnitudes.max() / sample(features).median(),
    )
