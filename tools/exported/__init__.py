"""Any plan as a Hugging Face folder that carries its own code: what stands in its config.json, and the code.

The two code files here are what people get. They import torch and transformers alone, and the tensors they name are
our own, under ``model.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.errors import ConfigError

CODE = ("configuration_equipoise.py", "modeling_equipoise.py")
PREFIX = "model."  # before our names of the tensors


def remote_config(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, with every value that follows from others written out; token ids and the dtype are
    the caller's. ConfigError where a function stands that the code here does not know."""
    from models.plan import resolve_plan

    plan = resolve_plan(config)
    return {
        "architectures": ["EquipoiseForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_equipoise.EquipoiseConfig",
            "AutoModelForCausalLM": "modeling_equipoise.EquipoiseForCausalLM",
        },
        "model_type": "equipoise",
        "trunk": config.trunk,
        "sites": {site: _settings(site, entry, config) for site, entry in plan.sites.items()},
        "embedding_scale": plan.embedding_scale,
        "qk_scope": plan.qk_scope,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "intermediate_size": config.feedforward_width,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "bias": config.bias,
        "tie_word_embeddings": config.is_tied,
        "dropout": config.dropout,
        "use_cache": True,
    }


def _settings(site: str, entry: str | Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The function at a site with all its settings, as both ``model.sites`` and the exported code read it."""
    given = {"function": entry} if isinstance(entry, str) else entry
    known: dict[str, dict[str, Any]] = {
        "rmsnorm": {"eps": config.norm_eps},
        "layernorm": {"eps": config.norm_eps, "bias": config.bias},
        "l2norm": {"eps": config.norm_eps},
        "dyt": {"beta": False},
        "derf": {"beta": True},
    }
    function = given["function"]
    if function not in known:
        raise ConfigError(
            f"model.sites.{site}: {function} has no exported form; write one in tools/exported, or use "
            + ", ".join(known)
        )
    return {"function": function} | {key: given.get(key, default) for key, default in known[function].items()}


def remote_code_files(config: ModelConfig) -> dict[str, bytes]:
    """File name -> content of the code that runs ``remote_config(config)``, the same for every configuration that it
    can run; ConfigError for another."""
    remote_config(config)
    here = Path(__file__).parent
    # transformers knows the files of a folder by their relative imports
    return {name: (here / name).read_bytes().replace(b"from tools.exported.", b"from .") for name in CODE}
