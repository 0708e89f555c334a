"""GGUF files of the llama architecture, dequantized. The gguf library is read with, and is needed only here."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from models import ModelConfig
from models.errors import ConfigError
from tools.formats.lazy import LazyTensor, in_file
from tools.formats.names import gguf_name
from tools.formats.tokenizer import FAST, SENTENCEPIECE
from tools.formats.weights import Weights, checked, parameter_shapes, run_config

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_CONTROL = 3
# How text is cut before merges apply, by tokenizer.ggml.pre.
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_CUTTING = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
}
# Under "llama.": understood, or of no effect on the function.
_KNOWN = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
}
_NEUTRAL = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}


def read(path: Path) -> Weights:
    """The weights and the tokenizer. Values stored in fp32, bf16 or fp16 stay in it; quantized ones become fp32."""
    library = _library()
    try:
        reader = library.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: _stored(path, tensor, library) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"{path} is no whole GGUF file ({reason}): get it again") from None
    config = _Fields(fields, path).model_config(stored)
    names = {gguf_name(name): name for name in parameter_shapes(config)}
    if "rope_freqs.weight" in stored:
        raise ConfigError(f"{path} has rope_freqs.weight: scaled rotary positions are not computed here")
    model = {names.get(name, name): tensor for name, tensor in stored.items()}
    for name in model:
        heads = {"q": config.heads, "k": config.key_value_heads}.get(name.rsplit(".", 2)[-2])
        if ".attention." in name and heads:
            model[name] = _in_halves(model[name], heads)
    tokenizer, notes = _tokenizer(fields)
    return Weights(run_config(config), checked(config, model, path), tokenizer=tokenizer, notes=notes)


def _library() -> Any:
    try:
        importlib.import_module("gguf.quants")
        return importlib.import_module("gguf")
    except ImportError:
        raise ConfigError("GGUF files need the gguf library, which is not here: pip install gguf") from None


def _stored(path: Path, tensor: Any, library: Any) -> LazyTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    kind, offset, count = tensor.tensor_type, int(tensor.data_offset), int(tensor.n_bytes)
    if offset + count > path.stat().st_size:
        raise ValueError(f"{tensor.name} ends after the file")
    if kind.name in _PLAIN:
        return in_file(path, offset, shape, _PLAIN[kind.name])
    raw = in_file(path, offset, library.quant_shape_to_byte_shape(shape, kind), torch.uint8)

    def read() -> Tensor:
        try:
            return torch.from_numpy(library.quants.dequantize(raw.read().numpy(), kind)).reshape(shape).contiguous()
        except NotImplementedError:
            raise ConfigError(f"{path}: {tensor.name} is quantized as {kind.name}, which gguf cannot undo") from None

    return LazyTensor(shape, torch.float32, read)


def _in_halves(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Rows of query and key in transformers' order and ours, (i, i + half) a pair; llama.cpp has pairs side by side."""
    if tensor.shape[0] % (2 * heads):
        return tensor  # of a wrong shape, which others will say

    def read() -> Tensor:
        pairs = tensor.read().unflatten(0, (heads, tensor.shape[0] // heads // 2, 2))
        return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()

    return LazyTensor(tensor.shape, tensor.dtype, read)


class _Fields:
    def __init__(self, fields: dict[str, Any], path: Path) -> None:
        self._fields, self._path = fields, path

    def model_config(self, stored: dict[str, LazyTensor]) -> ModelConfig:
        architecture = self._fields.get("general.architecture")
        if architecture != "llama":
            raise ConfigError(f"{self._path} is of the architecture {architecture}: only llama is imported from GGUF")
        for name, value in self._fields.items():
            key = name.removeprefix("llama.")
            if key != name and key not in _KNOWN and not (key in _NEUTRAL and value == _NEUTRAL[key]):
                raise ConfigError(f"{self._path} has {name} {value!r}, which our transformer does not compute")
        width, heads = self._count("embedding_length"), self._count("attention.head_count")
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            if width % heads or self._count(key, width // heads) != width // heads:
                raise ConfigError(
                    f"{self._path} has llama.{key} {self._fields.get(f'llama.{key}')}, width {width}, {heads} heads: "
                    "here a head's width, all of it turned by RoPE, is the model's divided by the heads"
                )
        if "token_embd.weight" not in stored:
            raise ConfigError(f"{self._path} lacks token_embd.weight: it is not complete, get it again")
        return ModelConfig(
            plan="llama",
            trunk="llama",
            width=width,
            depth=self._count("block_count"),
            heads=heads,
            kv_heads=self._count("attention.head_count_kv", heads),
            ffn_width=self._count("feed_forward_length"),
            vocab_size=stored["token_embd.weight"].shape[0],
            context=self._count("context_length"),
            bias=any(name.endswith(".bias") for name in stored),
            tied="output.weight" not in stored,
            norm_eps=_rounded(self._number("attention.layer_norm_rms_epsilon")),
            rope_theta=float(self._number("rope.freq_base", 10000.0)),
        )

    def _number(self, key: str, default: float | None = None) -> Any:
        value = self._fields.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{self._path}: llama.{key} is {value!r}: it has to be a positive number")
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        return int(self._number(key, default))


def _rounded(value: float) -> float:
    """The short decimal that a 32-bit float was written from: 1e-5, not 9.99999974e-06."""
    return float(f"{value:.6g}")


def _tokenizer(fields: dict[str, Any]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The tokenizer's files, and a note if it is of a kind that is not converted or cannot train."""
    kinds: dict[Any, Callable[[dict[str, Any]], dict[str, bytes]]] = {"llama": _sentencepiece, "gpt2": _byte_level}
    kind, cutting = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind not in kinds or (kind == "gpt2" and cutting not in _CUTTING):
        return {}, (
            f"its tokenizer ({kind}, {cutting}) is not converted: take its files from where the model was made",
        )
    files = kinds[kind](fields)
    return files, () if SENTENCEPIECE in files else ("its tokenizer is no sentencepiece model: it cannot train on",)


def _sentencepiece(fields: dict[str, Any]) -> dict[str, bytes]:
    """A sentencepiece model from its pieces, with the settings of LLaMA's."""
    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()
    columns = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for piece, score, kind in zip(*columns, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    for name in ("unk_id", "bos_id", "eos_id"):
        key = {"unk_id": "unknown_token_id"}.get(name, name.replace("_id", "_token_id"))
        setattr(proto.trainer_spec, name, int(fields.get(f"tokenizer.ggml.{key}", -1)))
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = False
    return {SENTENCEPIECE: proto.SerializeToString()}


def _byte_level(fields: dict[str, Any]) -> dict[str, bytes]:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    fast = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    fast.pre_tokenizer = _CUTTING[fields["tokenizer.ggml.pre"]]
    fast.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    generation: dict[str, Any] = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token = fields.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            settings[f"{name}_token"] = tokens[token]
            generation[f"{name}_token_id"] = int(token)
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    generation.pop("unk_token_id", None)
    return {
        FAST: fast.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n",
        "generation_config.json": json.dumps(generation, indent=2).encode() + b"\n",
    }
