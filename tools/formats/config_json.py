"""config.json of models from elsewhere: every key in it is understood, known to be harmless, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from models import ModelConfig
from models.config import ResidualConfig
from models.errors import ConfigError, nearest
from models.plan import BLOCK_SITES, PLANS, SITES
from models.residual import CONSTANT
from tools.exported import RESIDUALS, SETTINGS, WEIGHTS, defaults, remote_config

# They say how a model is loaded, trained, sampled from or described, not what it computes.
_HARMLESS = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout"),
    *("output_hidden_states", "output_attentions", "return_dict", "task_specific_params", "id2label", "label2id"),
    *("chunk_size_feed_forward", "problem_type", "transformers.js_config", "is_llama_config", "_attn_implementation"),
    *("max_length", "gradient_checkpointing", "keys_to_ignore_at_inference", "attn_implementation"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
}
# What these classes compute, and the one value at which it is what we compute.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "tie_encoder_decoder": (False,),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "logits_scaling": (1, 1.0),
    "quantization_config": (),
}
_LLAMA = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window"),
}
_GPT2 = {
    *("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "layer_norm_epsilon"),
    "tie_word_embeddings",
}
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "GPT2LMHeadModel": "gpt2",
    "EquipoiseForCausalLM": "equipoise",
}


def model_config(described: Mapping[str, Any], where: Path) -> ModelConfig:
    """The ModelConfig of a LLaMA, Mistral-like or GPT-2 config.json, or one of our own. ConfigError for any other, or
    if a key is set that makes it compute what our transformer does not."""
    path, kind = where / "config.json", kind_of(described, where)
    if kind == "equipoise":
        given = {key: value for key, value in described.items() if value is not None}
        read = _Reader(defaults() | given, path)
        read.refuse_unknown(defaults().keys() | {"auto_map"})
        return read.equipoise()
    read = _Reader(described, path)
    read.refuse_unknown(_GPT2 if kind == "gpt2" else _LLAMA)
    return read.gpt2() if kind == "gpt2" else read.llama(mistral=kind == "mistral")


def check_same(ours: Mapping[str, Any], described: Mapping[str, Any], where: Path) -> None:
    """ConfigError unless a config.json says the same, absent keys and all, as the config.yaml beside it."""
    for key, value in ours.items():
        if described.get(key) != value:
            raise ConfigError(
                f"{where}: config.yaml makes {key} {value}, config.json says {described.get(key)}: remove config.yaml "
                "to go by config.json"
            )


def kind_of(described: Mapping[str, Any], where: Path) -> str:
    """llama, mistral, gpt2 or equipoise; ConfigError for anything else."""
    architectures, kind = described.get("architectures"), described.get("model_type")
    if architectures:
        name = architectures[0] if isinstance(architectures, list) else architectures
        known = _ARCHITECTURES.get(name) if isinstance(name, str) else None
        if known is not None and kind in (None, known):
            return known
    else:
        name = kind
        if kind in _ARCHITECTURES.values():
            return str(kind)
    raise ConfigError(
        f"{where / 'config.json'} describes the architecture {name} (model_type {kind}): only "
        f"{', '.join(_ARCHITECTURES)} are imported"
    )


def _exported(config: ModelConfig) -> dict[str, Any] | None:
    """None if it has no exported form."""
    try:
        return remote_config(config)
    except ConfigError:
        return None


class _Reader:
    def __init__(self, described: Mapping[str, Any], path: Path | str) -> None:
        self._described, self._path = described, path

    def refuse_unknown(self, read: Set[str]) -> None:
        for key, value in self._described.items():
            if value is None or key in read or key in _HARMLESS:
                continue
            if key not in _NEUTRAL:
                self._refuse(key, "which is not known here and may change what the model computes")
            if value not in _NEUTRAL[key]:
                self._refuse(key, "which our transformer does not compute")

    def _refuse(self, key: str, why: str) -> None:
        raise ConfigError(f"{self._path} has {key} {self._described[key]!r}, {why}: this model cannot be imported")

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._described.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{self._path}: {key} is {value!r}: it has to be a positive number")
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._number(key, default)
        if value != int(value):
            raise ConfigError(f"{self._path}: {key} is {value!r}: it has to be a whole number")
        return int(value)

    def _flag(self, key: str, default: bool) -> bool:
        value = self._described.get(key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self._path}: {key} is {value!r}: it has to be true or false")
        return default if value is None else value

    def llama(self, mistral: bool) -> ModelConfig:
        """Absent keys have the defaults of transformers' LlamaConfig and MistralConfig."""
        width, heads = self._count("hidden_size"), self._count("num_attention_heads")
        context = self._count("max_position_embeddings", 4096 * 32 if mistral else 2048)
        window = self._described.get("sliding_window", 4096 if mistral else None)
        if window is not None and not (mistral and isinstance(window, int) and window >= context):
            raise ConfigError(
                f"{self._path} has sliding_window {window!r} at a context of {context}: sliding windows are not "
                "computed here; write null if the model was trained without"
            )
        if width % heads or self._count("head_dim", width // heads) != width // heads:
            self._refuse_head_width(width, heads)
        bias, mlp_bias = self._flag("attention_bias", False), self._flag("mlp_bias", False)
        if bias != mlp_bias:
            raise ConfigError(
                f"{self._path} has attention_bias {bias} and mlp_bias {mlp_bias}: here a model has biases in all "
                "linears or in none"
            )
        return ModelConfig(
            plan="llama",
            trunk="llama",
            width=width,
            depth=self._count("num_hidden_layers"),
            heads=heads,
            kv_heads=self._count("num_key_value_heads", 8 if mistral else heads),
            ffn_width=self._count("intermediate_size"),
            vocab_size=self._count("vocab_size"),
            context=context,
            bias=bias,
            tied=self._flag("tie_word_embeddings", False),
            norm_eps=self._number("rms_norm_eps", 1e-6),
            rope_theta=self._rope_theta(),
        )

    def _refuse_head_width(self, width: int, heads: int) -> None:
        raise ConfigError(
            f"{self._path} has head_dim {self._described.get('head_dim')}, hidden_size {width} and {heads} heads: here "
            "a head's width is the model's divided by the heads"
        )

    def _rope_theta(self) -> float:
        theta = self._described.get("rope_theta")
        for key in ("rope_parameters", "rope_scaling"):
            rope = self._described.get(key)
            if rope is None:
                continue
            if not isinstance(rope, dict):
                self._refuse(key, "which is no mapping")
            scaling = rope.get("rope_type", rope.get("type", "default"))
            others = sorted(rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
            if scaling != "default" or others or rope.get("partial_rotary_factor", 1) != 1:
                raise ConfigError(
                    f"{self._path} has {key} of type {scaling!r} ({', '.join(others) or 'no factors'}): scaled rotary "
                    "positions are not computed here"
                )
            inner = rope.get("rope_theta")
            if theta is not None and inner is not None and inner != theta:
                raise ConfigError(f"{self._path}: rope_theta is {theta} and {key} says {inner}: keep one")
            theta = inner if theta is None else theta
        if theta is None:
            return 10000.0
        return float(_Reader({"rope_theta": theta}, self._path)._number("rope_theta"))

    def gpt2(self) -> ModelConfig:
        """Absent keys have the defaults of transformers' GPT2Config. Dropout is the user's to set again."""
        width = self._count("n_embd", 768)
        return ModelConfig(
            plan="gpt",
            trunk="gpt",
            width=width,
            depth=self._count("n_layer", 12),
            heads=self._count("n_head", 12),
            ffn_width=self._count("n_inner", 4 * width),
            vocab_size=self._count("vocab_size", 50257),
            context=self._count("n_positions", 1024),
            bias=True,
            tied=self._flag("tie_word_embeddings", True),
            norm_eps=self._number("layer_norm_epsilon", 1e-5),
        )

    def equipoise(self) -> ModelConfig:
        """The inverse of ``remote_config``, by the plan that has the same sites if one has."""
        sites, first = self._sites("sites", SITES), self._sites("first_sites", BLOCK_SITES)
        epsilons = {settings["eps"] for settings in (*sites.values(), *first.values()) if "eps" in settings}
        first_blocks = 0 if self._described["first_blocks"] == 0 else self._count("first_blocks")
        if first_blocks:  # theirs are all sites of these blocks, ours the changes
            first = {s: first.get(s, "none") for s in BLOCK_SITES if first.get(s) != sites.get(s)}
        settings: dict[str, Any] = {
            "sites": sites,
            "first_sites": first,
            "first_blocks": first_blocks,
            "residual": self._residual(),
            "weights": self._word("weights", WEIGHTS),
            "trunk": self._word("trunk", ("llama", "gpt")),
            "width": self._count("hidden_size"),
            "depth": self._count("num_hidden_layers"),
            "heads": self._count("num_attention_heads"),
            "kv_heads": self._count("num_key_value_heads"),
            "ffn_width": self._count("intermediate_size"),
            "vocab_size": self._count("vocab_size"),
            "context": self._count("max_position_embeddings"),
            "bias": self._flag("bias", False),
            "tied": self._flag("tie_word_embeddings", False),
            "embedding_scale": "learned" if self._flag("embedding_scale", False) else "none",
            "qk_scope": self._word("qk_scope", ("head", "projection")),
            "dropout": 0.0 if self._described["dropout"] == 0 else self._number("dropout"),
            "norm_eps": epsilons.pop() if len(epsilons) == 1 else ModelConfig.norm_eps,
            "rope_theta": self._number("rope_theta"),
        }
        try:
            config = ModelConfig(plan="none", **settings)
            written = remote_config(config)
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error}") from None
        of_plan: dict[str, Any] = {"sites": {}, "first_sites": {}, "first_blocks": None, "residual": ResidualConfig()}
        of_plan |= dict.fromkeys(("weights", "embedding_scale", "qk_scope"), "plan")
        for plan in PLANS:
            named = replace(config, plan=plan, **of_plan)
            if _exported(named) == written:
                return named
        return config

    def _residual(self) -> ResidualConfig:
        scheme = self._word("residual", RESIDUALS)
        constant = float(self._number("residual_constant"))
        if scheme not in CONSTANT and constant != 1:
            self._refuse("residual_constant", f"which {scheme} does not have")
        return ResidualConfig(scheme=scheme, constant=constant if scheme in CONSTANT else None)

    def _sites(self, key: str, known: tuple[str, ...]) -> dict[str, Any]:
        found = self._described[key]
        if not isinstance(found, dict):
            self._refuse(key, "which is no mapping")
        for site in found:
            if site not in known:
                raise ConfigError(f"{self._path}: {key}.{site}: there is no such site; {nearest(site, known)}")
        return {site: self._site(entry, f"{self._path}: {key}.{site}") for site, entry in found.items()}

    def _site(self, entry: Any, where: str) -> dict[str, Any]:
        function = entry.get("function") if isinstance(entry, dict) else None
        if not isinstance(function, str) or function not in SETTINGS:
            raise ConfigError(f"{where} is {entry!r}: it has to name one of the functions {', '.join(SETTINGS)}")
        expected = {"function", *SETTINGS[function]}
        absent = {"gain": True, "alpha": "learned", "shift": function == "derf"}  # what folders mean that lack them
        settings = {key: value for key, value in absent.items() if key in expected} | entry
        for key in sorted(settings.keys() ^ expected):
            problem = "lacks" if key in expected else "has"
            raise ConfigError(f"{where} {problem} {key}: {function} has {', '.join(SETTINGS[function])}")
        read = _Reader(settings, where)
        for key in SETTINGS[function]:
            if key == "eps" or (key == "alpha" and settings[key] != "learned"):
                settings[key] = read._number(key)
            elif key != "alpha":
                settings[key] = read._flag(key, False)
        return settings

    def _word(self, key: str, known: tuple[str, ...]) -> Any:
        value = self._described[key]
        if value not in known:
            raise ConfigError(f"{self._path}: {key} is {value!r}: it has to be {', '.join(known[:-1])} or {known[-1]}")
        return value
