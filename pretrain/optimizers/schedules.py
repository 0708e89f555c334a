"""The learning rate over time, as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

from math import cos, pi

from models.errors import ConfigError
from pretrain.config import ScheduleConfig


def learning_rate_fraction(step: int, steps: int, config: ScheduleConfig) -> float:
    """The share of the peak learning rate that optimizer step ``step`` (from 0) of ``steps`` uses.

    Warmup of W steps, t = (step + 1) / W: linear is t, quadratic is 1 - (1 - t)². The first step therefore
    moves, and step W - 1 is the first at the peak. From the peak (step 0 without warmup) the decay runs to
    ``final_fraction`` f, reached at the last step, with u from 0 to 1 over its steps::

        cosine    f + (1 - f) · (1 + cos πu) / 2
        linear    f + (1 - f) · (1 - u)
        wsd       1, then as linear over the last ``decay_fraction`` of the run
        constant  1

    A run that ends at its peak (W = steps, or one step) does not decay. fms-fsdp, which trained the DyT
    paper's LLaMA, lets the cosine run from step 0 and takes the smaller of the two factors instead.

    Raises:
        ConfigError: warmup longer than the run, overlap of warmup and decay, or a fraction out of range.
    """
    assert 0 <= step < steps
    _validate(steps, config)
    warmup = config.warmup_steps
    if step < warmup:
        t = (step + 1) / warmup
        return t if config.warmup == "linear" else 1.0 - (1.0 - t) ** 2
    peak = max(warmup - 1, 0)
    match config.name:
        case "constant":
            return 1.0
        case "cosine":
            shape = (1.0 + cos(pi * _progress(step, peak, steps))) / 2.0
        case "linear":
            shape = 1.0 - _progress(step, peak, steps)
        case "wsd":
            start = max(peak, steps - 1 - _decay_steps(steps, config))
            shape = 1.0 - _progress(step, start, steps)
    return config.final_fraction + (1.0 - config.final_fraction) * shape


def _progress(step: int, start: int, steps: int) -> float:
    """0 up to step ``start``, 1 at the last step."""
    return (step - start) / (steps - 1 - start) if step > start else 0.0


def _decay_steps(steps: int, config: ScheduleConfig) -> int:
    return max(1, round(config.decay_fraction * steps))


def _validate(steps: int, config: ScheduleConfig) -> None:
    if not 0 <= config.warmup_steps <= steps:
        raise ConfigError(
            f"schedule.warmup_steps is {config.warmup_steps}, but the run has {steps} steps: "
            "write a number between 0 and that"
        )
    if not 0.0 <= config.final_fraction <= 1.0:
        raise ConfigError(f"schedule.final_fraction is {config.final_fraction}: write a number from 0 to 1")
    if config.name == "wsd":
        if not 0.0 < config.decay_fraction <= 1.0:
            raise ConfigError(
                f"schedule.decay_fraction is {config.decay_fraction}: write a number above 0 and at most 1"
            )
        decay = _decay_steps(steps, config)
        if config.warmup_steps + decay > steps:
            raise ConfigError(
                f"schedule.warmup_steps {config.warmup_steps} and schedule.decay_fraction "
                f"{config.decay_fraction} ({decay} steps) overlap in a run of {steps} steps: lower one"
            )
