"""The learning rate's curve: values worked out by hand, and what must hold for every curve."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.config import ScheduleConfig
from pretrain.optimizers import learning_rate_fraction


def curve(steps: int, **settings: object) -> list[float]:
    config = ScheduleConfig(**settings)  # type: ignore[arg-type]
    return [learning_rate_fraction(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize(
    ("steps", "settings", "expected"),
    [
        (5, {"name": "linear", "final_fraction": 0.2}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        (5, {"name": "cosine", "final_fraction": 0.0}, [1.0, 0.5 + 8**-0.5, 0.5, 0.5 - 8**-0.5, 0.0]),
        (5, {"name": "constant", "final_fraction": 0.0}, [1.0] * 5),
        (6, {"name": "linear", "warmup_steps": 4, "final_fraction": 0.5}, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5]),
        (
            4,
            {"name": "constant", "warmup_steps": 4, "warmup": "quadratic"},
            [1 - 0.75**2, 1 - 0.5**2, 1 - 0.25**2, 1.0],
        ),
        (
            10,
            {"name": "wsd", "warmup_steps": 2, "decay_fraction": 0.4, "final_fraction": 0.0},
            [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0],
        ),
        (1, {"name": "cosine"}, [1.0]),
        (2, {"name": "cosine", "warmup_steps": 2}, [0.5, 1.0]),
    ],
)
def test_values_by_hand(steps: int, settings: dict[str, object], expected: list[float]) -> None:
    assert curve(steps, **settings) == pytest.approx(expected, abs=1e-12)  # fp64


def test_quadratic_warmup_is_that_of_fms_fsdp() -> None:
    """Its formula, 1 - (1 - min(t, W)/W)², with t counted from 1 (facts: the LLaMA recipe of DyT)."""
    w = 7
    theirs = [1 - (1 - min(t, w) / w) ** 2 for t in range(1, w + 1)]
    assert curve(7, name="constant", warmup_steps=w, warmup="quadratic") == pytest.approx(theirs)


@given(
    steps=st.integers(1, 300),
    warmup_share=st.floats(0.0, 1.0),
    warmup=st.sampled_from(["linear", "quadratic"]),
    name=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    final=st.floats(0.0, 1.0),
    decay=st.floats(0.01, 1.0),
)
def test_shape(steps: int, warmup_share: float, warmup: str, name: str, final: float, decay: float) -> None:
    warmup_steps = int(warmup_share * steps)
    decay_steps = max(1, round(decay * steps))
    if name == "wsd":
        assume(warmup_steps + decay_steps <= steps)
    values = curve(
        steps,
        name=name,
        warmup_steps=warmup_steps,
        warmup=warmup,
        final_fraction=final,
        decay_fraction=decay,
    )
    peak = max(warmup_steps - 1, 0)
    rising, falling = values[: peak + 1], values[peak:]
    assert min(values) > 0.0 or final == 0.0
    assert values[0] > 0.0 or steps == 1
    assert max(values) == values[peak] == 1.0
    assert rising == sorted(set(rising))  # strictly
    # cos is not exactly monotone in its last place where it is flat
    assert all(b <= a + 1e-15 for a, b in pairwise(falling))
    assert all(value >= final - 1e-15 for value in falling)
    if name != "constant" and peak < steps - 1:
        assert values[-1] == final
    # continuous: no step is larger than the steepest slope of its piece (quadratic 2/W, cosine π/2 over n)
    fall = {"cosine": steps - 1 - peak, "linear": steps - 1 - peak, "wsd": min(decay_steps, steps - 1), "constant": 1}
    largest = max(2.0 / max(warmup_steps, 1) if peak else 0.0, 1.6 * (1 - final) / max(fall[name], 1))
    assert all(abs(b - a) <= largest + 1e-12 for a, b in pairwise(values))


@given(steps=st.integers(2, 50), final=st.floats(0.0, 1.0))
def test_wsd_that_decays_all_the_way_is_linear(steps: int, final: float) -> None:
    wsd = curve(steps, name="wsd", decay_fraction=1.0, final_fraction=final)
    assert wsd == curve(steps, name="linear", final_fraction=final)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"warmup_steps": 11}, "schedule.warmup_steps is 11, but the run has 10 steps"),
        ({"warmup_steps": -1}, "schedule.warmup_steps"),
        ({"final_fraction": 1.5}, "schedule.final_fraction"),
        ({"final_fraction": float("nan")}, "schedule.final_fraction"),
        ({"name": "wsd", "decay_fraction": 0.0}, "schedule.decay_fraction"),
        ({"name": "wsd", "decay_fraction": 0.8, "warmup_steps": 3}, "overlap"),
    ],
)
def test_mistakes(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        curve(10, **settings)
