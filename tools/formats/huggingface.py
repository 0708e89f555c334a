"""Hugging Face folders: LLaMA, Mistral-like and GPT-2 models both ways, and every other plan with code of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from models import ModelConfig
from models.errors import ConfigError
from models.plan import SITES, resolve_plan
from tools.exported import remote_code_files, remote_config
from tools.formats import companions
from tools.formats.config_json import check_same, kind_of, model_config
from tools.formats.files import member, read_indexed, read_json, read_pickle, read_safetensors, state_dict
from tools.formats.lazy import LazyTensor, cast
from tools.formats.names import from_gpt2, from_llama, to_gpt2, to_llama, with_gains
from tools.formats.tokenizer import FAST, SENTENCEPIECE, end_of_document, hub_files, put_before, without_piece
from tools.formats.weights import Weights, checked, rounded, run_config
from tools.formats.writing import Advance, write_json, write_sharded

_STOCK = {"LlamaForCausalLM": ("llama", "rmsnorm"), "GPT2LMHeadModel": ("gpt", "layernorm")}
_PRE = ("attn_in", "mlp_in", "final")
_NO_SENTENCEPIECE = (
    f"there is no sentencepiece model in it, no {SENTENCEPIECE}: its tokenizer is kept for the way back, but "
    "tools.prepare cannot use it to train on"
)
_OWN_PREFIX = "model."  # of our names, in folders with code of their own


def obstacle(config: ModelConfig, architecture: str) -> str:
    """The setting that keeps ``architecture`` from computing what ``config`` does; "" if it is the same function.

    A gain or a shift that ``config`` leaves out is none: it is written as ones or zeros (names.py).
    """
    trunk, function = _STOCK[architecture]
    plan = resolve_plan(config)
    if config.trunk != trunk:
        return f"model.trunk is {config.trunk}, it has {trunk}'s"
    if plan.embedding_scale:
        return "model.embedding_scale is learned, it has none"
    if plan.of_block(0, config.depth).sites != plan.sites:
        return "the first blocks have sites of their own, its blocks are all the same"
    if plan.residual != "plain":
        return f"model.residual.scheme is {plan.residual}, it has plain sums"
    if plan.weights != "plain":
        return f"model.weights is {plan.weights}, it uses them as they are"
    settings: list[dict[str, Any]] = []
    for site in SITES:
        entry = plan.sites.get(site)
        named = {"function": entry} if entry is None or isinstance(entry, str) else dict(entry)
        wanted = function if site in _PRE else None
        if named["function"] != wanted:
            return f"site {site} has {named['function'] or 'nothing'}, it has {wanted or 'nothing'} there"
        settings += [named] if wanted else []
    if len({entry.get("eps", config.norm_eps) for entry in settings}) > 1:
        return "its norms have one eps, those of model.sites differ"
    if trunk == "gpt" and config.key_value_heads != config.heads:
        return f"model.kv_heads is {config.kv_heads}, it has as many as heads"
    return ""


def stock_config(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """config.json of one of transformers' own classes, as far as it determines the function."""
    final = resolve_plan(config).sites["final"]
    eps = config.norm_eps if isinstance(final, str) else final.get("eps", config.norm_eps)
    if architecture == "GPT2LMHeadModel":
        return {
            "architectures": [architecture],
            "model_type": "gpt2",
            "vocab_size": config.vocabulary,
            "n_embd": config.width,
            "n_inner": config.feedforward_width,
            "n_layer": config.depth,
            "n_head": config.heads,
            "n_positions": config.context,
            "layer_norm_epsilon": eps,
            "activation_function": "gelu_new",
            "tie_word_embeddings": config.is_tied,
        }
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.feedforward_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context,
        "rms_norm_eps": eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.is_tied,
    }


def stock_architecture(config: ModelConfig) -> tuple[str, str]:
    """(the class of transformers that computes ``config``, "") or ("", why neither does)."""
    reasons = {architecture: obstacle(config, architecture) for architecture in _STOCK}
    fitting = [architecture for architecture, reason in reasons.items() if not reason]
    if fitting:
        return fitting[0], ""
    nearer = "GPT2LMHeadModel" if config.trunk == "gpt" else "LlamaForCausalLM"
    return "", f"{nearer} cannot hold it: {reasons[nearer]}"


def read(folder: Path, allow_pickle: bool) -> Weights:
    """A folder with config.json and safetensors files, or pytorch_model.bin if pickles are allowed."""
    described = read_json(folder / "config.json")
    tensors = _tensors(folder, allow_pickle)
    own = companions.read(folder)
    model = model_config(described, folder)
    if own is not None:
        check_same(_described(own.config.model), _described(model), folder)
        model = own.config.model
    kind = kind_of(described, folder)
    if kind == "equipoise":
        named = {name.removeprefix(_OWN_PREFIX): tensor for name, tensor in tensors.items()}
    else:
        named = (from_gpt2 if kind == "gpt2" else from_llama)(tensors, model, folder)
    named = checked(model, named, folder)
    if own is not None:
        return own.weights(named)
    tokenizer = companions.read_tokenizer(folder)
    ids = {key: described[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in described}
    tokenizer.setdefault("generation_config.json", json.dumps(ids).encode())
    notes = [_NO_SENTENCEPIECE] if FAST in tokenizer and SENTENCEPIECE not in tokenizer else []
    if token := put_before(tokenizer):
        notes.append(
            f"transformers puts {token} before every text for it, our tools do not: to evaluate it as it is, give "
            f"tools.evaluate {folder}"
        )
    return Weights(run_config(model), named, tokenizer=tokenizer, notes=tuple(notes))


def _described(config: ModelConfig) -> dict[str, Any]:
    """config.json as we write it."""
    architecture, _ = stock_architecture(config)
    return stock_config(config, architecture) if architecture else remote_config(config)


def _tensors(folder: Path, allow_pickle: bool) -> dict[str, LazyTensor]:
    def read_bin(path: Path) -> dict[str, LazyTensor]:
        return state_dict(read_pickle(path, allow_pickle), path)

    for stem, reader in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return read_indexed(folder, index, reader)
        if (folder / stem).is_file():
            return reader(member(folder, stem))
    raise ConfigError(f"{folder} has a config.json but neither model.safetensors nor pytorch_model.bin: get it again")


def write(weights: Weights, folder: Path, dtype: torch.dtype | None, shard_size: int, advance: Advance) -> list[str]:
    """Writes the folder; returns what the user should know of it."""
    tensors, described, code, notes = layout(weights, dtype)
    write_sharded(folder, tensors, shard_size, advance)
    files, note = hub_files(weights.tokenizer, weights.config.model.context)
    eos = end_of_document(weights.tokenizer)
    ids = {} if eos is None else {"bos_token_id": eos, "eos_token_id": eos}
    generation = _generation(files.pop("generation_config.json", b"{}")) or {**ids, "do_sample": False}
    unused = without_piece(weights.tokenizer, weights.config.model.vocabulary)
    if unused and "suppress_tokens" not in generation:
        generation["suppress_tokens"] = unused  # or generate could draw them
    ids |= {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in generation}
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    kind = min(names, key=lambda name: getattr(torch, name).itemsize)
    write_json(folder / "config.json", {**described, **ids, "dtype": kind, "torch_dtype": kind})
    write_json(folder / "generation_config.json", generation)
    for name, content in {**files, **code}.items():
        (folder / name).write_bytes(content)
    companions.write(weights, folder)
    return [*notes, *([note] if note else [])]


def _generation(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError("generation_config.json of the source is no JSON object: get it again, or remove it")
    return found


def layout(
    weights: Weights, dtype: torch.dtype | None
) -> tuple[dict[str, LazyTensor], dict[str, Any], dict[str, bytes], list[str]]:
    """(tensors by their names in the folder, config.json, files of code, notes)."""
    model = weights.config.model
    architecture, reason = stock_architecture(model)
    if architecture:
        described = stock_config(model, architecture)
        # One dtype for all, as every tool that reads these classes expects.
        whole = {n: t if dtype is None else cast(t, dtype, n) for n, t in with_gains(weights.model, model).items()}
        if architecture == "GPT2LMHeadModel":
            rates = dict.fromkeys(("resid_pdrop", "embd_pdrop"), model.dropout) | {"attn_pdrop": 0.0}
            return to_gpt2(whole, model), described | rates, {}, []
        return to_llama(whole), described, {}, []
    described, code = remote_config(model), remote_code_files(model)
    tensors = {_OWN_PREFIX + name: tensor for name, tensor in rounded(weights, dtype).items()}
    return tensors, described, code, [f"{reason}: the folder has code of its own (trust_remote_code=True)"]
