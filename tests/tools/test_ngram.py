"""The n-gram against one made of dicts, straight from the formula, and against what any distribution must satisfy."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.data.manifest import read_manifest
from tests.tools.small_run import prepare_small
from tools import ngram
from tools.ngram import KneserNey, read_tokens

streams = st.integers(2, 9).flatmap(
    lambda vocabulary: st.tuples(
        st.just(vocabulary),
        st.lists(st.integers(0, vocabulary - 1), min_size=4, max_size=60),
        st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=20),
    )
)


def naive(training: Sequence[int], vocabulary: int, order: int, context: tuple[int, ...], token: int) -> float:
    """p(token | context), recursively, with every count taken from the training stream anew."""
    if order == 0:
        return 1 / vocabulary
    context = context[len(context) - (order - 1) :]
    counts: Counter[tuple[int, ...]] = Counter()
    if order == ORDER:
        for i in range(len(training) - order + 1):
            counts[tuple(training[i : i + order])] += 1
    else:
        before: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for i in range(1, len(training) - order + 1):
            before[tuple(training[i : i + order])].add(training[i - 1])
        counts.update({gram: len(tokens) for gram, tokens in before.items()})
    once = sum(c == 1 for c in counts.values())
    twice = sum(c == 2 for c in counts.values())
    discount = once / (once + 2 * twice) if once else 0.5
    lower = naive(training, vocabulary, order - 1, context[1:], token)
    follow = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == context}
    total = sum(follow.values())
    if total == 0:
        return lower
    return (max(follow.get(token, 0) - discount, 0) + discount * len(follow) * lower) / total


ORDER = 3


@settings(max_examples=60)
@given(streams)
def test_every_probability_is_the_formula_s(stream: tuple[int, list[int], list[int]]) -> None:
    vocabulary, training, text = stream
    found = KneserNey(np.array(training), vocabulary, ORDER).probabilities(np.array(text))
    for i, token in enumerate(text):
        # At the start of a stream there is less context than the order takes, and a lower order answers.
        order = min(ORDER, i + 1)
        expected = naive(training, vocabulary, order, tuple(text[:i]), token)
        # Both are a few fp64 operations on the same small integers.
        assert found[i] == pytest.approx(expected, rel=1e-12)


@settings(max_examples=40)
@given(streams, st.integers(1, 4))
def test_probabilities_sum_to_one_after_any_context(stream: tuple[int, list[int], list[int]], order: int) -> None:
    vocabulary, training, context = stream
    model = KneserNey(np.array(training), vocabulary, order)
    after = [model.probabilities(np.array([*context, token]))[-1] for token in range(vocabulary)]
    assert min(after) > 0
    assert sum(after) == pytest.approx(1, rel=1e-12)


def test_discounts_are_estimated_per_order_from_counts_of_one_and_two() -> None:
    # Bigrams: 01 x2, 10 x2, 02 x1 -> n1 = 1, n2 = 2.
    # predecessors: of 0 {1}, of 1 {0}, of 2 {0} -> n1 = 3, n2 = 0.
    model = KneserNey(np.array([0, 1, 0, 1, 0, 2]), 3, 2)
    assert model.discounts == [1.0, 1 / 5]


def test_more_context_helps_where_text_repeats_itself() -> None:
    random = np.random.default_rng(0)
    sentence = random.integers(0, 50, 12)
    noise = random.integers(0, 50, 2000)
    training = np.concatenate([np.concatenate([sentence, noise[i : i + 5]]) for i in range(0, 2000, 5)])

    def bits(order: int) -> float:
        return -np.log2(KneserNey(training, 50, order).probabilities(sentence)[3:]).mean()

    assert bits(1) > 3 > 1 > bits(3)  # 12 of 17 tokens recur after the same two; alone each is one among fifty


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ngram")
    return prepare_small(folder)


def test_the_command_scores_the_targets_that_training_validates_on(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ngram", str(prepared), "--order", "2"])
    ngram.main()
    line = next(line for line in capsys.readouterr().out.splitlines() if "validation" in line)

    manifest = read_manifest(prepared)
    tokens, size = read_tokens(prepared, "validation")
    assert (len(tokens), size) == (manifest.splits["validation"].tokens, manifest.splits["validation"].bytes)
    training, _ = read_tokens(prepared, "train")
    model = KneserNey(training, manifest.vocabulary, 2)
    bits = sum(-math.log2(p) for p in model.probabilities(tokens)[1:])
    assert f"{bits / size:.4f} bits per byte" in line
    # Ten equally likely words of 3.8 letters with a space: log2(10) / 3.8 bits a byte is the floor.
    assert 0.8 < bits / size < 1.5


@pytest.mark.parametrize(
    ("options", "message"), [(["--order", "0"], "--order is 0"), (["--split", "tset"], "no split 'tset'")]
)
def test_mistakes_are_named(prepared: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    monkeypatch.setattr("sys.argv", ["ngram", str(prepared), *options])
    with pytest.raises(ConfigError, match=message):
        ngram.main()
