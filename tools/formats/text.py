"""Real text in a model's own tokens, to compare, calibrate and judge it by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from models.errors import ConfigError
from models.loss import IGNORE
from pretrain.batch import Batch, document_numbers, make_batch
from pretrain.config import RunConfig
from pretrain.counts import derive_counts
from pretrain.data import EvaluationSet, austen, open_source
from tools.formats.tokenizer import FAST, SENTENCEPIECE, loaded, parsed
from tools.formats.weights import Weights

_SEQUENCES = 8  # to calibrate on, and that go through a model at once
_HELD_OUT = 8192  # tokens to judge by
_LONGEST = 1024  # tokens in a sequence of the novel


class RealText(NamedTuple):
    """``state``: of the data of the weights' run before its first sample; empty if it is not known what that is."""

    calibration: Batch
    calibration_name: str
    held_out: list[Batch]
    held_out_name: str
    state: dict[str, Any]


def persuasion(weights: Weights, count: int) -> list[int]:
    """The first ``count`` tokens of the novel by the model's own tokenizer; none if it has none."""
    novel = austen.novels()["Persuasion"][: 20 * count]
    ids: Sequence[int] = []
    if FAST in weights.tokenizer:
        ids = parsed(weights.tokenizer[FAST]).encode(novel, add_special_tokens=False).ids
    elif SENTENCEPIECE in weights.tokenizer:
        ids = loaded(weights.tokenizer[SENTENCEPIECE]).encode(novel)
    return [token for token in ids if token < weights.config.model.vocabulary][:count]


def real_text(weights: Weights) -> RealText:
    """Text of the weights' run, the first of its first batch to calibrate on; of the novel, if it has none."""
    return _of_run(weights) if weights.data else _of_novel(weights)


def _of_run(weights: Weights) -> RealText:
    config, data = weights.config, weights.config.data
    source = open_source(data, config.seed)
    state = source.state()
    if data.source == "prepared":
        source.load_state(weights.data)  # refuses text that is not the run's
    where = data.path if data.source == "prepared" else data.stream.dataset
    first = min(_SEQUENCES, derive_counts(config, 1).sequences)
    count = max(1, _HELD_OUT // data.sequence_length)
    rows = torch.from_numpy(source.read(range(first)))
    calibration = make_batch(rows, source.eos, data.document_mask)
    name = f"{first} x {data.sequence_length} tokens of {where}, train"
    if source.validation is not None:
        held_out = _spread(source.validation, count, config, source.eos)
        return RealText(calibration, name, held_out, f"{_count(held_out)} tokens of {where}, validation", state)
    rows = torch.from_numpy(source.read(range(first, first + count)))
    held_out = [make_batch(part, source.eos, data.document_mask) for part in rows.split(_SEQUENCES)]
    return RealText(calibration, name, held_out, f"{_count(held_out)} more tokens of {where}, train", state)


def _spread(split: EvaluationSet, count: int, config: RunConfig, eos: int) -> list[Batch]:
    """``count`` windows of the split, as pretrain/evaluation.py takes them."""
    count = min(count, split.count)
    windows = [torch.from_numpy(part) for part in split.read([i * split.count // count for i in range(count)])]
    parts = zip(*(rows.split(_SEQUENCES) for rows in windows), strict=True)
    mask = config.data.document_mask
    return [Batch(inputs, targets, document_numbers(inputs, eos) if mask else None) for inputs, targets in parts]


def _of_novel(weights: Weights) -> RealText:
    length = min(weights.config.data.sequence_length, _LONGEST)
    count = _SEQUENCES + max(1, _HELD_OUT // length)
    ids = persuasion(weights, count * (length + 1))
    if len(ids) < count * (length + 1):
        raise ConfigError("the model has no tokenizer for text to try it on: write --to native --data.path PREPARED")
    calibration, *held_out = (
        make_batch(part, eos=0, document_mask=False)
        for part in torch.tensor(ids).view(count, length + 1).split(_SEQUENCES)
    )
    name = f"{_SEQUENCES} x {length} tokens of Persuasion"
    return RealText(calibration, name, held_out, f"{_count(held_out)} more tokens of it", {})


def _count(batches: Sequence[Batch]) -> str:
    return f"{targets(batches):,}"


def targets(batches: Sequence[Batch]) -> int:
    """How many tokens of ``batches`` are to be predicted."""
    return sum(int(batch.targets.ne(IGNORE).sum()) for batch in batches)
