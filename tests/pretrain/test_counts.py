"""Batch, micro-batch, accumulation and steps: they multiply up, and an error names numbers that do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import ConfigError, ModelConfig
from pretrain.config import DataConfig, RunConfig, TrainConfig
from pretrain.counts import derive_counts


def run(length: int = 8, **train: int | None) -> RunConfig:
    given = {"steps": None if train.get("tokens") else 10} | train
    return RunConfig(
        model=ModelConfig(context=length), data=DataConfig(sequence_length=length), train=TrainConfig(**given)
    )


sizes = st.integers(1, 12)


@given(world=sizes, accumulation=sizes, micro=sizes, length=st.integers(1, 64), tokens=st.integers(1, 100_000))
def test_the_parts_multiply_to_the_batch(world: int, accumulation: int, micro: int, length: int, tokens: int) -> None:
    batch = world * accumulation * micro * length
    counts = derive_counts(run(length, batch_tokens=batch, micro_batch=micro, tokens=tokens), world)
    assert counts.sequences == counts.world_size * counts.accumulation * counts.micro_batch
    assert (counts.world_size, counts.accumulation, counts.micro_batch) == (world, accumulation, micro)
    assert counts.batch_tokens == batch
    assert (counts.steps - 1) * batch < tokens <= counts.steps * batch


@given(world=sizes, share=sizes)
def test_without_a_micro_batch_a_rank_takes_its_whole_share(world: int, share: int) -> None:
    counts = derive_counts(run(batch_tokens=8 * world * share), world)
    assert (counts.micro_batch, counts.accumulation, counts.steps) == (share, 1, 10)


def suggestion(error: ConfigError) -> int:
    message = str(error)
    assert "\n" not in message
    found = re.search(r": write (\d+)$", message)
    assert found, message
    return int(found[1])


@given(world=sizes, length=st.integers(1, 64), batch=st.integers(-10, 5_000))
def test_a_batch_that_does_not_divide_is_told_one_that_does(world: int, length: int, batch: int) -> None:
    unit = world * length
    if batch > 0 and batch % unit == 0:
        assert derive_counts(run(length, batch_tokens=batch), world).batch_tokens == batch
        return
    with pytest.raises(ConfigError, match=r"train\.batch_tokens") as caught:
        derive_counts(run(length, batch_tokens=batch), world)
    better = suggestion(caught.value)
    assert derive_counts(run(length, batch_tokens=better), world).batch_tokens == better
    assert better == unit or abs(better - batch) <= unit / 2, "the nearest one"


@given(share=st.integers(1, 60), micro=st.integers(1, 80))
def test_a_micro_batch_that_does_not_divide_is_told_one_that_does(share: int, micro: int) -> None:
    if share % micro == 0:
        assert derive_counts(run(batch_tokens=8 * share, micro_batch=micro), 1).accumulation == share // micro
        return
    with pytest.raises(ConfigError, match=r"train\.micro_batch") as caught:
        derive_counts(run(batch_tokens=8 * share, micro_batch=micro), 1)
    better = suggestion(caught.value)
    assert better < micro, "no more memory than was asked for"
    assert derive_counts(run(batch_tokens=8 * share, micro_batch=better), 1).micro_batch == better


@pytest.mark.parametrize("key", ["steps", "tokens", "micro_batch"])
@pytest.mark.parametrize("value", [0, -3])
def test_numbers_below_one_are_refused(key: str, value: int) -> None:
    train = {"batch_tokens": 64, key: value} | ({"steps": None} if key == "tokens" else {})
    with pytest.raises(ConfigError, match=rf"train\.{key} is {value}: write a positive number"):
        derive_counts(run(**train), 1)
