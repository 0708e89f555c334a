"""Text to token ids and back: sentencepiece BPE with byte fallback, set up so that nothing of the text is lost.

Ids of a tokenizer trained here: 0 <unk> (never produced, bytes stand in for unknown characters), 1 <s> (never produced;
LLaMA's place for it), 2 </s>, the end of a document, 3..258 the bytes, then the pieces. There is no padding id: what
pads is never a target.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from models.errors import ConfigError

# sentencepiece writes a space as U+2581 and decodes every U+2581 as a space; a literal one goes through its bytes.
_SPACE_MARK = "\u2581"
_SEGMENT_CHARACTERS = 1 << 15
_TRAINING_SENTENCE_CHARACTERS = 4000
_TRAINING_THREADS = 16  # a constant, because the model file records it and its bytes must not depend on the machine


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A BPE model with ``vocab_size`` ids as the bytes of a ``.model`` file; the same texts give the same bytes.

    Raises ConfigError if the text cannot fill so many pieces, or has more distinct characters than that.
    """
    model = io.BytesIO()
    sentences = (piece for text in texts for piece in _cut(text, _TRAINING_SENTENCE_CHARACTERS))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=8 * _TRAINING_SENTENCE_CHARACTERS,  # bytes; longer ones would be left out
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        message = " ".join(str(error).split())
        if most := re.search(r"set it to a value <= (\d+)", message):
            remedy = f"write at most {most[1]}, or give more text"
        elif least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            remedy = f"write at least {least[1]}, for its characters alone"
        else:
            remedy = message
        raise ConfigError(f"no tokenizer with {vocab_size} pieces can be trained on this text: {remedy}") from error
    return model.getvalue()


def _cut(text: str, size: int) -> Iterator[str]:
    """Pieces of at most ``size`` characters that begin at a space, where there is one to cut at."""
    start = 0
    while len(text) - start > size:
        cut = start + size
        space = text.rfind(" ", start + 1, cut)
        if space > start:
            cut = space
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


class Tokenizer:
    """A sentencepiece model file.

    ``decode(encode(text)) == text`` for every text that UTF-8 can write, with a tokenizer trained here (a model from
    elsewhere normalizes as its maker chose). Text that UTF-8 cannot write, a lone surrogate, is a TypeError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"tokenizer {self.path} does not exist: give a sentencepiece .model file")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"tokenizer {self.path} is not a sentencepiece model: give another file") from error
        self.size: int = self._model.vocab_size()
        self.eos: int = self._model.eos_id()
        if self.eos < 0:
            raise ConfigError(f"tokenizer {self.path} has no end-of-document piece: train one with tools.tokenizer")
        self._mark_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._has_bytes = all(self._model.is_byte(piece) for piece in self._mark_bytes)
        # BPE costs more than linear time in the length of a text. Where no piece can span the place before a space,
        # the parts' ids are the whole's; that holds for the tokenizers trained here, and is checked for others. Text
        # without a space over a whole segment is cut all the same, always at the same place.
        no_inner_space = not any(_SPACE_MARK in self._model.id_to_piece(i)[1:] for i in range(self.size))
        encode = self._model.encode
        self._cuttable = no_inner_space and encode("a b") == encode("a") + encode(" b")

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without EOS."""
        return self.encode_batch([text], threads=1)[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens], without EOS; in parallel, outside of Python's lock."""
        segments: list[str] = []
        owners: list[list[int | None]] = []  # per text: an index into segments, or None for a literal U+2581
        for text in texts:
            owner: list[int | None] = []
            for k, part in enumerate(text.split(_SPACE_MARK) if self._has_bytes else [text]):
                if k:
                    owner.append(None)
                for segment in _cut(part, _SEGMENT_CHARACTERS) if self._cuttable else [part]:
                    owner.append(len(segments))
                    segments.append(segment)
            owners.append(owner)
        ids = self._model.encode(segments, num_threads=threads) if segments else []
        mark = np.array(self._mark_bytes, np.int32)
        empty = np.empty(0, np.int32)
        return [
            np.concatenate([empty, *(mark if k is None else np.array(ids[k], np.int32) for k in owner)])
            for owner in owners
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; EOS and other control ids have none."""
        return self._model.decode([int(i) for i in ids])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """How the model writes these ids: U+2581 for a space, <0x..> for a byte."""
        return [self._model.id_to_piece(int(i)) for i in ids]
