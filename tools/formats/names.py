"""What others call our tensors, and how they lay them out.

LLaMA's names differ and nothing else does: models/rotary.py pairs the features of RoPE as transformers does. GPT-2
holds matrices transposed (its Conv1D) and query, key and value as one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from models import ModelConfig
from models.errors import ConfigError
from tools.formats.lazy import LazyTensor, filled, joined, split, transposed
from tools.formats.weights import complain_of, parameter_shapes

_LLAMA_OUTER = {"embedding": "model.embed_tokens", "final": "model.norm", "head": "lm_head"}
_LLAMA_BLOCK = {
    "attn_in": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_in": "post_attention_layernorm",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
_GPT2_OUTER = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "final": "transformer.ln_f",
    "head": "lm_head",
}
_GPT2_BLOCK = {
    "attn_in": "ln_1",
    "attention.out": "attn.c_proj",
    "mlp_in": "ln_2",
    "feedforward.up": "mlp.c_fc",
    "feedforward.down": "mlp.c_proj",
}
_GGUF_OUTER = {"embedding": "token_embd", "final": "output_norm", "head": "output"}
_GGUF_BLOCK = {
    "attn_in": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "mlp_in": "ffn_norm",
    "feedforward.gate": "ffn_gate",
    "feedforward.up": "ffn_up",
    "feedforward.down": "ffn_down",
}
# Buffers that older versions of transformers saved; they follow from the configuration.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias))")


def _renamed(name: str, outer: Mapping[str, str], block: Mapping[str, str], blocks: str) -> str:
    module, kind = name.rsplit(".", 1)
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return f"{blocks}.{match[1]}.{block[match[2]]}.{kind}"
    return f"{outer[module]}.{kind}"


def llama_name(name: str) -> str:
    return _renamed(name, _LLAMA_OUTER, _LLAMA_BLOCK, "model.layers")


def gguf_name(name: str) -> str:
    return _renamed(name, _GGUF_OUTER, _GGUF_BLOCK, "blk")


def gpt2_name(name: str) -> str:
    """Of what GPT-2 does not hold as one with something else."""
    return _renamed(name, _GPT2_OUTER, _GPT2_BLOCK, "transformer.h")


def with_gains(model: Mapping[str, LazyTensor], config: ModelConfig) -> dict[str, LazyTensor]:
    """LLaMA and GPT-2 always have gains: where ours are absent, ones."""
    absent = [name for name in _gains(config) if name not in model]
    return {**model, **{name: filled(1.0, (config.width,), model["embedding.weight"].dtype) for name in absent}}


def _gains(config: ModelConfig) -> list[str]:
    blocks = [f"blocks.{block}.{site}.weight" for block in range(config.depth) for site in ("attn_in", "mlp_in")]
    return [*blocks, "final.weight"]


def to_llama(model: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {llama_name(name): tensor for name, tensor in model.items()}


def from_llama(tensors: Mapping[str, LazyTensor], config: ModelConfig, where: Path) -> dict[str, LazyTensor]:
    """By our names; what has none keeps its own, for others to complain of. Gains that ``config`` does not have may
    only be one."""
    ours = {llama_name(name): name for name in parameter_shapes(config)}
    kept = {name: tensor for name, tensor in tensors.items() if not _BUFFERS.fullmatch(name)}
    _settle_head(kept, "model.embed_tokens.weight", config, where)
    _settle_gains(kept, llama_name, config, where)
    return {ours.get(name, name): tensor for name, tensor in kept.items()}


def to_gpt2(model: Mapping[str, LazyTensor], config: ModelConfig) -> dict[str, LazyTensor]:
    """GPT-2 always has biases: where ours are absent, zeros."""
    left = dict(model)

    def bias(weight: str, size: int) -> LazyTensor:
        found = left.pop(weight.removesuffix("weight") + "bias", None)
        return filled(0.0, (size,), left[weight].dtype) if found is None else found

    tensors: dict[str, LazyTensor] = {}
    for name in [name for name in model if name.endswith(".weight")]:
        if name.endswith((".attention.k.weight", ".attention.v.weight")):
            continue  # with the query's
        if name.endswith(".attention.q.weight"):
            stem = name.removesuffix("q.weight")
            out = gpt2_name(f"{stem}out.weight")
            theirs = out.replace("c_proj", "c_attn")
            biases = [bias(f"{stem}{part}.weight", config.width) for part in "qkv"]
            tensors[theirs] = transposed(joined([left[f"{stem}{part}.weight"] for part in "qkv"]))
            tensors[theirs.removesuffix("weight") + "bias"] = joined(biases)
            continue
        theirs = gpt2_name(name)
        is_linear = ".attention." in name or ".feedforward." in name
        if is_linear or ".ln_" in theirs:
            tensors[theirs.removesuffix("weight") + "bias"] = bias(name, left[name].shape[0])
        tensors[theirs] = transposed(left[name]) if is_linear else left[name]
    return tensors


def from_gpt2(tensors: Mapping[str, LazyTensor], config: ModelConfig, where: Path) -> dict[str, LazyTensor]:
    """By our names; what has none keeps its own. Biases that ``config`` does not have may only be zero, and
    gains one."""
    # OpenAI's files name GPT2Model's tensors, without the prefix that GPT2LMHeadModel's have.
    outer = ("transformer.", "lm_head.")
    theirs = {name if name.startswith(outer) else f"transformer.{name}": t for name, t in tensors.items()}
    theirs = {name: tensor for name, tensor in theirs.items() if not _BUFFERS.fullmatch(name)}
    _settle_head(theirs, "transformer.wte.weight", config, where)
    _settle_gains(theirs, gpt2_name, config, where)
    model: dict[str, LazyTensor] = {}
    shapes = parameter_shapes(config)
    for name in shapes:
        if re.search(r"\.attention\.[qkv]\.", name):
            continue
        found = theirs.pop(gpt2_name(name), None)
        if found is not None:
            is_linear = ".attention." in name or ".feedforward." in name
            model[name] = transposed(found) if is_linear else found
    for block in range(config.depth):
        for kind in ("weight", "bias"):
            fused = theirs.get(f"transformer.h.{block}.attn.c_attn.{kind}")
            names = [f"blocks.{block}.attention.{part}.{kind}" for part in "qkv"]
            if fused is None or names[0] not in shapes:
                continue
            expected = (config.width, 3 * config.width) if kind == "weight" else (3 * config.width,)
            if fused.shape != expected:
                raise ConfigError(
                    f"{where}: h.{block}.attn.c_attn.{kind} has the shape {fused.shape}, its configuration makes it "
                    f"{expected}: they belong to different models"
                )
            del theirs[f"transformer.h.{block}.attn.c_attn.{kind}"]
            model |= dict(zip(names, split(transposed(fused), 3), strict=True))
    absent = [name for name in theirs if name.startswith("transformer.") and name.endswith(".bias")]
    wrong = [name for name in absent if len(theirs[name].shape) == 1 and theirs[name].read().any()]
    complain_of(wrong, f"{where} was written without biases, but there is", "remove its config.yaml")
    return model | {name: tensor for name, tensor in theirs.items() if name not in absent}


def _settle_head(tensors: dict[str, LazyTensor], embedding: str, config: ModelConfig, where: Path) -> None:
    """A tied head may stand in the file a second time, but not differ from the embedding."""
    head = tensors.get("lm_head.weight")
    if head is None or not config.is_tied or embedding not in tensors:
        return
    if head.shape != tensors[embedding].shape or not head.read().equal(tensors[embedding].read()):
        raise ConfigError(
            f"{where}: config.json says that the head is tied to the embedding, but lm_head.weight is another tensor: "
            'write "tie_word_embeddings": false there if it is meant'
        )
    del tensors["lm_head.weight"]


def _settle_gains(
    tensors: dict[str, LazyTensor], theirs: Callable[[str], str], config: ModelConfig, where: Path
) -> None:
    """Removes the gains that ``config`` does not have; they have to be one."""
    shapes = parameter_shapes(config)
    absent = [theirs(name) for name in _gains(config) if name not in shapes]
    found = {name: tensors.pop(name) for name in absent if name in tensors}
    wrong = [name for name, tensor in found.items() if tensor.shape != (config.width,) or (tensor.read() != 1).any()]
    complain_of(wrong, f"{where} was written without gains, but there is", "remove its config.yaml")
