"""A sentencepiece model as the tokenizer.json that transformers loads, or not at all if the two would ever differ."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers

from models.errors import ConfigError
from pretrain.data import Tokenizer, austen
from tools.formats.files import read_json

SENTENCEPIECE = "tokenizer.model"
FAST = "tokenizer.json"
HUB_FILES = "huggingface"  # the folder in a run's own that holds the tokenizer of an imported model as it came
# What a Hugging Face folder may hold of its tokenizer; kept as it is on the way through other formats.
FILES = (
    SENTENCEPIECE,
    FAST,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_SPACE_MARK = "\u2581"
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
_ODD_TEXTS = (
    "",
    " ",
    "   three  spaces\n\n\ttabs\r\n and trailing ",
    "naïve café — “quotes” … ﬁ ﬀ ½ Å Å",
    "日本語のテキスト 한국어 العربية עברית ไทย हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 𝔘𝔫𝔦 \U0010ffff",
    "aaaaaaaaaaaa bbbbbbbbbbb ananananana 1111111111 ------ ......",
    "zero\u200bwidth \u202e \ufeff bom \x00 nul \x7f",
    "<s> </s> <unk> <0x41> [INST] <|endoftext|>",
    "def f(x):\n    return {'a': x[0] ** 2}  # comment\n",
)


def hub_files(files: Mapping[str, bytes], context: int) -> tuple[dict[str, bytes], str]:
    """The tokenizer's files for a Hugging Face folder, and what is to be said of them (nothing: "").

    A tokenizer that came from such a folder goes back as it was. A sentencepiece model gets a tokenizer.json if that
    gives the same ids and the same text back on everything tried; else it goes alone.
    """
    kept = dict(files)
    if FAST in files or SENTENCEPIECE not in files:
        return kept, "" if FAST in files else "there is no tokenizer to take along"
    ours = loaded(files[SENTENCEPIECE])
    fast, prefix = _fast(files[SENTENCEPIECE])
    if fast is None or not _agree(ours, fast, prefix):
        return kept, f"{FAST} would not reproduce this sentencepiece model: {SENTENCEPIECE} goes along alone"
    eos = ours.pieces([ours.eos])[0]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # A document begins after the end of another in training here, and <s> is never seen (pretrain/data).
        "bos_token": eos,
        "eos_token": eos,
        "unk_token": fast.model.unk_token,
        "split_special_tokens": True,  # "</s>" in a text is these four letters, as in training
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    made = {FAST: fast.to_str().encode(), "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n"}
    return kept | made, ""


def loaded(model: bytes) -> Tokenizer:
    """The tokenizer in the content of a sentencepiece model file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SENTENCEPIECE
        path.write_bytes(model)
        return Tokenizer(path)


class FastTokenizer(Tokenizer):
    """A tokenizer.json in the place of a sentencepiece model, for a model that came with one.

    It serves to evaluate and to sample. What it loses of a text, and what it makes of text that looks like one of its
    special tokens, is its maker's choice.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FAST
        try:
            self._fast = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"tokenizer {self.path} cannot be read: {error}") from None
        self.size = self._fast.get_vocab_size()
        settings = folder / "tokenizer_config.json"
        named = read_json(settings).get("eos_token") if settings.is_file() else None
        token = named.get("content") if isinstance(named, dict) else named
        eos = self._fast.token_to_id(token) if isinstance(token, str) else None
        if eos is None:
            raise ConfigError(f"tokenizer {self.path}: the tokenizer_config.json beside it names no eos_token it has")
        self.eos = eos

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        encodings = self._fast.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._fast.decode([int(i) for i in ids])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._fast.id_to_token(int(i)) or "" for i in ids]


def end_of_document(files: Mapping[str, bytes]) -> int | None:
    """The id that ends a document, of a sentencepiece model."""
    if SENTENCEPIECE not in files:
        return None
    proto = _proto(files[SENTENCEPIECE])
    eos = proto.trainer_spec.eos_id
    return eos if eos >= 0 else None


def without_piece(files: Mapping[str, bytes], vocabulary: int) -> list[int]:
    """The ids below ``vocabulary`` that no piece of the tokenizer has: there are some where the vocabulary is padded.
    None if there is no tokenizer."""
    if FAST in files:
        known = set(parsed(files[FAST]).get_vocab().values())
    elif SENTENCEPIECE in files:
        known = set(range(len(_proto(files[SENTENCEPIECE]).pieces)))
    else:
        return []
    return sorted(set(range(vocabulary)) - known)


def put_before(files: Mapping[str, bytes]) -> str:
    """The token that transformers puts before every text with this tokenizer, "" for none."""
    if FAST in files:
        encoding = parsed(files[FAST]).encode("a")
        return encoding.tokens[0] if encoding.special_tokens_mask[:1] == [1] else ""
    try:
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    except ValueError:
        raise ConfigError("tokenizer_config.json is no JSON: get it again, or remove it") from None
    return "its BOS" if isinstance(settings, dict) and settings.get("add_bos_token") is True else ""


def parsed(fast: bytes) -> tokenizers.Tokenizer:
    """The tokenizer in the content of a tokenizer.json."""
    try:
        return tokenizers.Tokenizer.from_buffer(fast)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{FAST} cannot be read ({error}): get it again, or remove it") from None


def _proto(model: bytes) -> Any:
    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()  # made at import, so type checkers do not see it
    try:
        proto.ParseFromString(model)
    except Exception:  # protobuf's DecodeError, which has no type that a checker knows
        raise ConfigError(f"{SENTENCEPIECE} is no sentencepiece model: get it again, or remove it") from None
    return proto


def _fast(model: bytes) -> tuple[tokenizers.Tokenizer | None, bool]:
    """The same tokenizer in the tokenizers library, None if it is not BPE with byte fallback on unchanged text; and
    whether a space is put before a text.

    Spaces stand in the vocabulary as spaces, not as U+2581: so a literal U+2581 goes through its bytes, as in
    pretrain/data/tokenizer.py.
    """
    proto = _proto(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    prefix = normalizer.add_dummy_prefix
    types = {piece.type for piece in proto.pieces}
    if (
        trainer.model_type != _BPE
        or not trainer.byte_fallback
        or trainer.treat_whitespace_as_suffix
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
        or not types <= {_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE}
    ):
        return None, prefix
    texts = [piece.piece.replace(_SPACE_MARK, " ") if piece.type == _NORMAL else piece.piece for piece in proto.pieces]
    normal = {text: i for i, text in enumerate(texts) if proto.pieces[i].type == _NORMAL}
    merges: list[tuple[str, str]] = []
    for text in sorted(normal, key=lambda text: -proto.pieces[normal[text]].score):
        halves = [(text[:i], text[i:]) for i in range(1, len(text))]
        known = [pair for pair in halves if pair[0] in normal and pair[1] in normal]
        merges += sorted(known, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    fast = tokenizers.Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(texts)},
            merges=merges,
            unk_token=next(p.piece for p in proto.pieces if p.type == _UNKNOWN),
            byte_fallback=True,
        )
    )
    if prefix:
        fast.normalizer = normalizers.Prepend(" ")
    if not any(" " in text[1:] for text in normal):  # then the words before spaces can be encoded each for itself
        fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    steps = [decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if prefix else [])]
    fast.decoder = decoders.Sequence(steps)
    return fast, prefix


def _agree(ours: Tokenizer, fast: tokenizers.Tokenizer, prefix: bool) -> bool:
    """On real text and odd one: the same ids, and from them the same text."""
    novel = austen.novels()["Emma"][:200_000]
    texts = [*_ODD_TEXTS, novel, *([] if prefix else [f"{_SPACE_MARK}a{_SPACE_MARK} b"])]
    texts += [novel[i:j] for i, j in pairwise(range(0, 20_000, 97))]
    for text in texts:
        ids = ours.encode(text)
        if fast.encode(text).ids != ids or fast.decode(ids) != ours.decode(ids):
            return False
    return True
