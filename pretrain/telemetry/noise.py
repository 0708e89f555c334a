"""The gradient noise scale: how large a batch can be before its gradient is hardly better than a smaller one's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """fp64 [], each an unbiased estimate but the last, which is their quotient.

    One step's are noisy, and |G|^2 may come out negative, where ``scale`` is NaN: average the first two over steps,
    then divide (the paper does).
    """

    gradient_squared: Tensor  # |G|^2 of the true gradient
    covariance_trace: Tensor  # tr(Sigma) of the gradient of one target token
    scale: Tensor  # B_simple = tr(Sigma) / |G|^2, in tokens


def noise_scale(part_squared: Tensor, part: Tensor, whole_squared: Tensor, whole: Tensor) -> Noise:
    """From the squared norms of two mean gradients, over ``part`` of a batch's tokens and over its ``whole``.

    arXiv 1812.06162, appendix A.1, since E|G_B|^2 = |G|^2 + tr(Sigma) / B for a mean over B::

        |G|^2     = (B_big |G_big|^2 - B_small |G_small|^2) / (B_big - B_small)
        tr(Sigma) = (|G_small|^2 - |G_big|^2) / (1/B_small - 1/B_big)

    Tokens of one sequence are not independent. That is no matter to B_simple if both counts are whole sequences: with
    sequences as the unit of B it is the same batch.
    """
    squared = (whole * whole_squared - part * part_squared) / (whole - part)
    trace = (part_squared - whole_squared) / (1 / part - 1 / whole)
    return Noise(squared, trace, torch.where(squared > 0, trace / squared, torch.nan))
