"""Figures that say what shape a distribution has, of gradients and activations alike.

All but ``over`` are free of scale: multiplied by a constant, a tensor keeps them. A histogram of magnitudes does not,
so that ten times smaller gradients are no evidence of lighter tails. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE = 2**16  # elements that quantiles and the Hill index are taken from
_TAIL = 0.01  # share of the sample that the Hill index looks at


def moments(x: Tensor) -> Tensor:
    """fp64 [5]: the count of ``x`` and the sums of its first four powers. Those of two parts add up to the whole's."""
    wide = x.detach().flatten().double()
    square = wide * wide
    sums = [wide.sum(), square.sum(), (square * wide).sum(), (square * square).sum()]
    return torch.stack([torch.full_like(sums[0], wide.numel()), *sums])


def kurtosis(of: Tensor) -> Tensor:
    """E(x - m)^4 / var^2, fp64, of ``moments`` [..., 5]: 3 for a Gaussian, NaN where nothing varies."""
    mean, second, third, fourth = (of[..., 1:] / of[..., :1]).unbind(-1)
    variance = second - mean**2
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    # Below rounding of the second moment a variance is none.
    return torch.where(variance > 1e-12 * second, central / variance**2, torch.nan)


def sample(x: Tensor, size: int = SAMPLE) -> Tensor:
    """Magnitudes of elements spread evenly over ``x``, at most ``size`` of them, fp32."""
    flat = x.detach().flatten()
    return flat[:: max(1, -(-flat.numel() // size))].float().abs()


class Tail(NamedTuple):
    """How heavy a tail is, fp32 []; NaN where a sample has nothing to say."""

    hill: Tensor  # index of a power law: P(|x| > t) ~ t^-hill. Smaller is heavier; below 4 there is no kurtosis
    ratio: Tensor  # quantile 99.9 % over the median: 4.9 for a Gaussian


def tail(magnitudes: Tensor) -> Tail:
    """Of a ``sample``: the Hill index (Ann. Statist. 3, 1975) of its largest hundredth, and the ratio of quantiles."""
    ordered = magnitudes.sort(descending=True).values
    count = ordered.numel()
    largest = max(1, int(count * _TAIL))
    if count < 2:
        nothing = torch.full((), torch.nan, device=magnitudes.device)
        return Tail(nothing, nothing)
    hill = (ordered[:largest] / ordered[largest]).log().mean().reciprocal()
    ratio = ordered[int(count * 0.001)] / ordered[count // 2]
    nan = ratio.new_full((), torch.nan)
    return Tail(torch.where(hill.isfinite(), hill, nan), torch.where(ratio.isfinite(), ratio, nan))


class Outliers(NamedTuple):
    """Of activations [..., features], fp32 []."""

    over: Tensor  # features with a magnitude above 6 somewhere: LLM.int8()'s outliers (arXiv 2208.07339)
    kurtosis: Tensor  # over features and tokens
    ratio: Tensor  # largest magnitude over the median one


def outliers(x: Tensor, threshold: float = 6.0) -> Outliers:
    features = x.detach().flatten(0, -2).float()
    magnitudes = features.abs()
    return Outliers(
        (magnitudes.amax(0) > threshold).sum().float(),
        kurtosis(moments(features)).float(),
        magnitudes.max() / sample(features).median(),
    )
