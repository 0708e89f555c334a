from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.data import Tokenizer
from pretrain.data import tokenizer as module
from pretrain.data.austen import novels
from pretrain.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer([novels()["Northanger Abbey"]], 1000))
    return Tokenizer(path)


def test_training_is_deterministic_and_fills_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert train_tokenizer([novels()["Northanger Abbey"]], 1000) == tokenizer.path.read_bytes()
    assert tokenizer.size == 1000
    assert tokenizer.pieces([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert tokenizer.eos == 2


# U+2581 is sentencepiece's own mark for a space; NUL, tabs, runs of spaces and line ends are what loses text elsewhere
pieces = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "\0", "\u2581", "</s>", "<0x41>", "the", "Catherine", "é", "😀"]),
)


@given(st.lists(pieces).map("".join))
def test_every_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < i < tokenizer.size for i in ids)  # never <unk>, <s> or </s>


def test_a_whole_novel_survives_and_is_compressed(tokenizer: Tokenizer) -> None:
    text = novels()["Persuasion"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(text.encode()) / len(ids) > 2.5  # 2.9 with 1000 pieces; bytes alone would give 1


@given(text=st.text(st.sampled_from("aeht. \n"), max_size=200), size=st.integers(1, 20))
def test_encoding_in_segments_gives_the_ids_of_the_whole(tokenizer: Tokenizer, text: str, size: int) -> None:
    whole = tokenizer._model.encode(text)
    parts = list(module._cut(text, size))
    assert "".join(parts) == text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SEGMENT_CHARACTERS", size)
        ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if all(part.startswith(" ") for part in parts[1:]):  # there was a space wherever one was needed
        assert ids == whole


def test_a_batch_is_the_texts_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["", "one", "a\u2581b", *(text[:20_000] for text in novels().values())]
    batch = tokenizer.encode_batch(texts, threads=3)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="not a sentencepiece model"):
        Tokenizer(tmp_path / "bad.model")
    with pytest.raises(ConfigError, match="no tokenizer with 4096 pieces") as caught:
        train_tokenizer(["too little text"], 4096)
    assert "\n" not in str(caught.value)
