from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.config import DataConfig, StreamConfig
from pretrain.data import Loader, Tokenizer, open_source, streaming
from pretrain.data.austen import novels
from pretrain.data.streaming import StreamingSource
from pretrain.data.tokenizer import train_tokenizer

LANES, LENGTH = 12, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """230 documents of very different lengths, some of them empty, and a tokenizer."""
    folder = tmp_path_factory.mktemp("stream")
    words = novels()["Emma"].split()
    (folder / "tokenizer.model").write_bytes(train_tokenizer([novels()["Emma"]], 600))
    choose = random.Random(0)
    texts = []
    for _ in range(230):
        count, at = choose.choice([0, 1, 5, 20, 200]), choose.randrange(10_000)
        texts.append(" ".join(words[at : at + count]))
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts))
    return folder


def config(folder: Path, **changes: Any) -> StreamConfig:
    given = {
        "dataset": str(folder / "documents.jsonl"),
        "tokenizer": str(folder / "tokenizer.model"),
        "lanes": LANES,
    }
    return StreamConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def reference(folder: Path) -> np.ndarray:
    """The samples by the definition, from all documents at once: int64 [windows * lanes, length + 1], four epochs."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    texts = [json.loads(line)["text"] for line in (folder / "documents.jsonl").read_text().splitlines()]
    documents = [[*tokenizer.encode(text), tokenizer.eos] for text in texts if text] * 4
    lanes = [list(itertools.chain(*documents[lane::LANES])) for lane in range(LANES)]
    windows = min(len(lane) - 1 for lane in lanes) // LENGTH
    samples = [lane[w * LENGTH : w * LENGTH + LENGTH + 1] for w in range(windows) for lane in lanes]
    return np.array(samples, np.int64)


def test_samples_are_the_definition_over_the_epochs(folder: Path, reference: np.ndarray) -> None:
    source = StreamingSource(config(folder), LENGTH)
    assert len(reference) > 2000
    assert np.array_equal(source.read(range(len(reference))), reference)


def read_with(
    folder: Path, world_size: int, batch_size: int, first_step: int, steps: int, state: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Global batches put together from all ranks, and the union of their last states, as a checkpoint stores it."""
    union: dict[str, Any] = {}
    out = np.zeros((steps, batch_size, LENGTH + 1), np.int64)
    for rank in range(world_size):
        source = StreamingSource(config(folder), LENGTH)
        if state:
            source.load_state(state)
        with Loader(source, batch_size=batch_size, rank=rank, world_size=world_size, first_step=first_step) as loader:
            for step in range(steps):
                batch = next(loader)
                out[step, rank::world_size] = batch.tokens.numpy()
        union |= batch.state
    return out.reshape(-1, LENGTH + 1), json.loads(json.dumps(union))


# 5 does not divide the lanes (ranks share them), 24 is more ranks than lanes
@settings(max_examples=5)
@given(worlds=st.lists(st.sampled_from([1, 2, 3, 4, 5, 24]), min_size=2, max_size=3), steps=st.integers(1, 5))
def test_any_world_size_and_any_restart_read_the_same(
    folder: Path, reference: np.ndarray, worlds: list[int], steps: int
) -> None:
    batch_size = 120  # the same sequence of global batches for every world size
    state: dict[str, Any] = {}
    for k, world_size in enumerate(worlds):
        rows, state = read_with(folder, world_size, batch_size, k * steps, steps, state)
        assert np.array_equal(rows, reference[k * steps * batch_size : (k + 1) * steps * batch_size])


def test_lanes_may_come_in_late(folder: Path, reference: np.ndarray) -> None:
    """Batches smaller than the number of lanes ask for the last lanes when the first have read on."""
    source = StreamingSource(config(folder), LENGTH)
    first = source.read([i for i in range(1200) if i % LANES < 5])
    assert np.array_equal(first, reference[[i for i in range(1200) if i % LANES < 5]])
    state = json.loads(json.dumps(source.state()))
    late = [i for i in range(1200) if i % LANES >= 5]
    assert np.array_equal(source.read(late), reference[late])
    resumed = StreamingSource(config(folder), LENGTH)
    resumed.load_state(state)
    assert np.array_equal(resumed.read(late), reference[late])


def test_a_rank_tokenizes_its_lanes_only_and_a_restart_not_the_past(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_ANCHOR_EVERY", 8)
    encoded: list[str] = []
    encode = Tokenizer.encode_batch

    def counting(self: Tokenizer, texts: list[str], threads: int) -> list[np.ndarray]:
        encoded.extend(texts)
        return encode(self, texts, threads)

    monkeypatch.setattr(Tokenizer, "encode_batch", counting)
    source = StreamingSource(config(folder), LENGTH)
    mine = [i for i in range(1200) if i % 4 == 1]
    source.read(mine)
    quarter = len(encoded)
    everyone = StreamingSource(config(folder), LENGTH)
    encoded.clear()
    everyone.read(range(1200))
    assert quarter < 0.4 * len(encoded)

    state = source.state()
    anchors = [value["anchor"]["document"] for key, value in state.items() if key.startswith("lane")]
    assert min(anchors) > 0  # it need not read from the start
    resumed = StreamingSource(config(folder), LENGTH)
    resumed.load_state(state)
    encoded.clear()
    resumed.read(range(1201, 1201 + LANES, 4))
    assert len(encoded) <= 3 * 8  # three lanes, for each the document at hand and those of one window


def test_state_does_not_grow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_ANCHOR_EVERY", 4)
    source = StreamingSource(config(folder), LENGTH)
    sizes = []
    for step in range(10):
        source.read(range(step * 240, (step + 1) * 240))
        sizes.append(len(json.dumps(source.state())))
    assert max(sizes) < 1.5 * sizes[0]
    # anchors are kept from the one that the slowest lane needs, not from the start
    assert source._reader._anchors[0].document == min(lane.anchor.document for lane in source._lanes.values()) > 0


def test_validation_is_the_first_documents_of_its_split(folder: Path) -> None:
    data = DataConfig(
        source="stream", sequence_length=8, stream=config(folder, validation_split="train", validation_documents=3)
    )
    source = open_source(data, seed=0)
    tokenizer = Tokenizer(source.tokenizer_path)
    texts = [json.loads(line)["text"] for line in (folder / "documents.jsonl").read_text().splitlines()]
    chosen = [text for text in texts if text][:3]
    ids = [i for text in chosen for i in [*tokenizer.encode(text), tokenizer.eos]]
    assert source.validation is not None
    _, targets = source.validation.read(range(source.validation.count))
    assert targets.ravel()[: len(ids) - 1].tolist() == ids[1:]
    assert source.validation.bytes == len("".join(chosen).encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": None}, "data.stream.dataset is missing"),
        ({"tokenizer": None}, "data.stream.tokenizer is missing"),
        ({"tokenizer": "none.model"}, "none.model does not exist"),
        ({"dataset": "none.jsonl"}, "none.jsonl does not exist"),
        ({"text_key": "txt"}, "no column 'txt': did you mean 'text'?"),
        ({"text_key": "n"}, "column 'n' holds int"),
        ({"split": "trian"}, "cannot be read as a dataset"),
        ({"lanes": 500}, "fewer than data.stream.lanes 500"),
        ({"lanes": 0}, "data.stream.lanes is 0"),
    ],
)
def test_mistakes_are_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StreamingSource(config(folder, **changes), LENGTH).read(range(600))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_documents(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": " \\n"}\n')
    with pytest.raises(ConfigError, match="has 0 documents"):
        StreamingSource(config(folder, dataset=str(tmp_path / "empty.jsonl")), LENGTH).read([0])


def test_a_state_of_another_stream_is_refused(folder: Path) -> None:
    state = StreamingSource(config(folder), LENGTH).state()
    with pytest.raises(ConfigError, match=r"data\.stream\.lanes is not what"):
        StreamingSource(config(folder, lanes=6), LENGTH).load_state(state)
