"""Training samples straight from a dataset that is tokenized while it is read.

The documents, counted through the epochs, are dealt to a fixed number of lanes in turn, like cards. A lane is the ids
of its documents, EOS behind each; global sample i is the next window of lane i % lanes. So the order is the dataset's
own and the same for any number of ranks: with world size W, lane l is read by rank l % W alone if W divides the lanes,
and only the lanes that a rank reads are tokenized by it. Otherwise every rank tokenizes every lane.

Lanes with short documents need more of them than others; a source keeps the texts that lie between its slowest and its
fastest lane. That distance grows with the square root of what was read.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.errors import ConfigError
from pretrain.config import StreamConfig
from pretrain.data import corpus
from pretrain.data.manifest import sha256_of
from pretrain.data.source import EvaluationSet, TokenArray
from pretrain.data.tokenizer import Tokenizer

_ANCHOR_EVERY = 256  # documents; so many at most are read again per restart, beside those between the lanes


@dataclass(frozen=True)
class Anchor:
    """A place to start reading from: before document ``document``, in the state ``rows`` of the dataset's iterator."""

    document: int
    rows: dict[str, Any] | None = None  # None: at the first row


@dataclass
class Lane:
    """Where a lane's next window begins: at token ``offset`` of document ``document``."""

    window: int
    document: int
    offset: int
    anchor: Anchor
    expects: int  # the document that it takes next
    texts: deque[str] = field(default_factory=deque)  # taken, not yet tokenized
    ids: deque[np.ndarray] = field(default_factory=deque)  # of ``document`` and those after it


class StreamingSource:
    """A TokenSource over a Hugging Face dataset or local files; within a lane, samples are read in ascending order.

    ConfigError if the dataset or the tokenizer cannot be read, or if there are fewer documents than lanes.
    """

    def __init__(self, config: StreamConfig, sequence_length: int) -> None:
        if config.dataset is None:
            raise ConfigError("data.stream.dataset is missing: write a dataset's name, or a file or folder of text")
        if config.tokenizer is None:
            raise ConfigError(
                "data.stream.tokenizer is missing: write a sentencepiece model (tools.tokenizer makes one)"
            )
        if config.lanes < 1:
            raise ConfigError(f"data.stream.lanes is {config.lanes}: write a positive number")
        self._tokenizer = Tokenizer(config.tokenizer)
        self.tokenizer_path = self._tokenizer.path
        self.vocabulary = self._tokenizer.size
        self.eos = self._tokenizer.eos
        self._length = sequence_length
        self._count = config.lanes
        self._identity = {
            "dataset": config.dataset,
            "subset": config.subset,
            "split": config.split,
            "lanes": config.lanes,
            "tokenizer": sha256_of(self._tokenizer.path),
        }
        self._reader = _Reader(config)
        self._lanes: dict[int, Lane] = {}  # those that were asked for
        self._resting: dict[int, dict[str, Any]] = {}  # the state that was loaded for the others
        self.validation = self._validation(config)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        for number in dict.fromkeys(index % self._count for index in indices):
            if number not in self._lanes:
                self._activate(number)
        rows = [self._window(index % self._count, index // self._count) for index in indices]
        return np.stack(rows) if rows else np.empty((0, self._length + 1), np.int64)

    def _activate(self, number: int) -> None:
        at = self._resting.pop(number, None)
        if at is None:
            lane = Lane(window=0, document=number, offset=0, anchor=Anchor(0), expects=number)
        else:
            lane = Lane(at["window"], at["document"], at["offset"], Anchor(**at["anchor"]), expects=at["document"])
        self._lanes[number] = lane
        if lane.expects < self._reader.position:
            self._reader.seek(lane.anchor)

    def _window(self, number: int, window: int) -> np.ndarray:
        """int64 [sequence_length + 1]. Windows that other ranks read are passed over."""
        lane = self._lanes[number]
        assert window >= lane.window, f"lane {number} is past window {window}: samples are read in ascending order"
        start = lane.offset + (window - lane.window) * self._length
        available = sum(map(len, lane.ids))
        while available < start + self._length + 1:
            ids = self._next_document(lane)
            lane.ids.append(ids)
            available += len(ids)
        tokens = TokenArray(lane.ids).read(start, self._length + 1)
        lane.window = window + 1
        lane.offset = start + self._length  # the last target is the next window's first input
        while lane.offset >= len(lane.ids[0]):
            lane.offset -= len(lane.ids.popleft())
            lane.document += self._count
        return tokens

    def _next_document(self, lane: Lane) -> np.ndarray:
        while not lane.texts:
            document, text = self._reader.next()
            receiver = self._lanes.get(document % self._count)
            if receiver is not None and receiver.expects == document:  # else read again, or not ours
                receiver.texts.append(text)
                receiver.expects += self._count
        return _with_eos(self._tokenizer, lane.texts.popleft())

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"stream": self._identity}
        # The window is in the key: where ranks share a lane, the union keeps what each knows, and the latest counts.
        for number, at in self._resting.items():
            state[f"lane {number} window {at['window']}"] = at
        for number, lane in self._lanes.items():
            lane.anchor = self._reader.anchor_before(lane.document, lane.anchor)
            state[f"lane {number} window {lane.window}"] = {
                "lane": number,
                "window": lane.window,
                "document": lane.document,
                "offset": lane.offset,
                "anchor": dataclasses.asdict(lane.anchor),
            }
        self._reader.forget_before(min((lane.anchor.document for lane in self._lanes.values()), default=0))
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        given = state.get("stream")
        if given != self._identity:
            changed = next((k for k, v in self._identity.items() if not given or given.get(k) != v), "dataset")
            raise ConfigError(
                f"data.stream.{changed} is not what the checkpoint was trained on: restore it, or start a run under a "
                "new name"
            )
        self._lanes.clear()
        self._resting.clear()
        self._reader.rewind()
        for at in (value for key, value in state.items() if key.startswith("lane ")):
            known = self._resting.get(at["lane"])
            if known is None or known["window"] < at["window"]:
                self._resting[at["lane"]] = at

    def _validation(self, config: StreamConfig) -> EvaluationSet | None:
        if config.validation_split is None:
            return None
        assert config.dataset is not None
        rows = corpus.stream(config.dataset, subset=config.subset, split=config.validation_split)
        texts = corpus.texts_of(rows, config.text_key, config.dataset)
        chosen = list(itertools.islice(texts, config.validation_documents))
        if not chosen:
            raise ConfigError(f"{config.dataset} has no text in data.stream.validation_split {config.validation_split}")
        ids = [_with_eos(self._tokenizer, text) for text in chosen]
        return EvaluationSet(ids, self._length, self.eos, sum(len(text.encode()) for text in chosen))


def _with_eos(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.append(tokenizer.encode_batch([text], threads=1)[0], tokenizer.eos)


class _Reader:
    """The documents of the dataset over and over, numbered through."""

    def __init__(self, config: StreamConfig) -> None:
        assert config.dataset is not None
        self._name = config.dataset
        self._text_key = config.text_key
        self._lanes = config.lanes
        self._rows = corpus.stream(config.dataset, subset=config.subset, split=config.split)
        self.rewind()

    def rewind(self) -> None:
        """Forget where it was; ``seek`` comes next."""
        self.position = sys.maxsize
        self._anchors: list[Anchor] = []

    def seek(self, anchor: Anchor) -> None:
        self._anchors = [known for known in self._anchors if known.document < anchor.document]
        self._start(anchor)

    def _start(self, anchor: Anchor) -> None:
        self.position = anchor.document
        self._anchors.append(anchor)
        self._rows.load_state_dict(anchor.rows)
        self._texts = corpus.texts_of(self._rows, self._text_key, self._name)

    def next(self) -> tuple[int, str]:
        """The next document and its number."""
        if self.position - self._anchors[-1].document >= _ANCHOR_EVERY:
            self._anchors.append(Anchor(self.position, self._rows.state_dict()))
        text = next(self._texts, None)
        if text is None:
            # The first epoch is over. With fewer documents than lanes, lanes would read the same text side by side.
            if self.position < self._lanes:
                raise ConfigError(
                    f"{self._name} has {self.position} documents, fewer than data.stream.lanes {self._lanes}: lower "
                    "that, or use tools.prepare, which needs no lanes"
                )
            self._start(Anchor(self.position))
            text = next(self._texts)
        self.position += 1
        return self.position - 1, text

    def anchor_before(self, document: int, known: Anchor) -> Anchor:
        """The last anchor from which ``document`` can be reached; ``known`` is one."""
        place = bisect.bisect_right(self._anchors, document, key=lambda anchor: anchor.document)
        return max([known, *self._anchors[max(0, place - 1) : place]], key=lambda anchor: anchor.document)

    def forget_before(self, document: int) -> None:
        """Drop the anchors that lie before the last one at or before ``document``."""
        place = bisect.bisect_right(self._anchors, document, key=lambda anchor: anchor.document)
        del self._anchors[: max(0, place - 1)]
