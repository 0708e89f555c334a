"""What happens to the alphas of DyT and its like beside the optimizer's step: a schedule, bounds.

The schedule is a factor m on all alphas, applied to the parameters themselves: before step k every alpha is multiplied
by m(k) / m(k - 1), before step 0 by m(0). So an alpha in a checkpoint is the one that the forward used, whoever loads
it; a resumed run goes on with it; and nothing in the forward knows of time. What the optimizer adds to an alpha is
scaled by later factors as the rest of it is. Its moments are not: they stay those of gradients with respect to the
alpha in effect.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.errors import ConfigError
from pretrain.config import AlphaControlConfig


def alpha_factor(step: int, steps: int, config: AlphaControlConfig) -> float:
    """What alphas are multiplied by before the forward of step ``step`` (from 0) of ``steps``.

    Raises:
        ConfigError: a setting out of range.
    """
    validate(config, steps)
    return multiplier(step, config) / (multiplier(step - 1, config) if step else 1.0)


def multiplier(step: int, config: AlphaControlConfig) -> float:
    """m(step): the first of ``multiplier`` up to step ``first``, the second from ``last`` on, linear in between."""
    if config.multiplier is None or config.multiplier_steps is None:
        return 1.0
    (begin, end), (first, last) = config.multiplier, config.multiplier_steps
    passed = min(max(step - first, 0), last - first) / (last - first)
    return begin + (end - begin) * passed


@torch.no_grad()
def scale(alphas: Sequence[Tensor], factor: float, bounds: Sequence[float] | None) -> None:
    """Multiply local tensors, some perhaps empty, and keep them within ``bounds``."""
    if alphas:
        torch._foreach_mul_(list(alphas), factor)
        keep_within(alphas, bounds)


@torch.no_grad()
def keep_within(alphas: Sequence[Tensor], bounds: Sequence[float] | None) -> None:
    """Of what is outside ``bounds``, the nearest value inside."""
    if alphas and bounds is not None:
        torch._foreach_clamp_min_(list(alphas), bounds[0])
        torch._foreach_clamp_max_(list(alphas), bounds[1])


def validate(config: AlphaControlConfig, steps: int | None = None) -> None:
    """ConfigError for a setting out of range; ``steps``: of the run, where it is known."""
    if (config.multiplier is None) != (config.multiplier_steps is None):
        raise ConfigError("optimizer.alpha.multiplier and optimizer.alpha.multiplier_steps go together: write both")
    if config.multiplier is not None and config.multiplier_steps is not None:
        if len(config.multiplier) != 2 or not all(0.0 < factor < float("inf") for factor in config.multiplier):
            raise ConfigError(
                f"optimizer.alpha.multiplier is {config.multiplier}: write two numbers above 0, [from, to]"
            )
        if len(config.multiplier_steps) != 2 or not 0 <= config.multiplier_steps[0] < config.multiplier_steps[1]:
            raise ConfigError(
                f"optimizer.alpha.multiplier_steps is {config.multiplier_steps}: write two steps, the later one last"
            )
        if steps is not None and config.multiplier_steps[1] >= steps:
            raise ConfigError(
                f"optimizer.alpha.multiplier_steps ends at step {config.multiplier_steps[1]}, and the last step of "
                f"this run is {steps - 1}: lower it"
            )
    if config.bounds is not None and (len(config.bounds) != 2 or not config.bounds[0] < config.bounds[1]):
        raise ConfigError(f"optimizer.alpha.bounds is {config.bounds}: write [low, high], the lower one first")
    if config.clip is not None and not config.clip > 0.0:
        raise ConfigError(f"optimizer.alpha.clip is {config.clip}: write a positive number, or null")
