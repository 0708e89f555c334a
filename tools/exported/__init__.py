"""Any plan as a Hugging Face folder that carries its own code: what stands in its config.json, and the code.

The code files here are what people get. They import torch and transformers alone, and the tensors they name are
our own, under ``model.``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from models.config import ModelConfig
from models.errors import ConfigError
from models.plan import BLOCK_SITES, NormPlan, resolve_plan
from models.residual import build_residual

CODE = (
    "configuration_equipoise.py",
    "norms_equipoise.py",
    "branches_equipoise.py",
    "modeling_equipoise.py",
)
PREFIX = "model."  # before our names of the tensors
# What can be exported: functions and their settings, how branches join the stream, what linears make of their weights.
_ELEMENTWISE = ("dyt", "derf", "hardtanh", "sigmoid", "logistic", "softsign", "isru", "identity")
SETTINGS = {
    "rmsnorm": ("eps", "gain"),
    "layernorm": ("eps", "bias", "gain"),
    "l2norm": ("eps",),
    **dict.fromkeys(_ELEMENTWISE, ("alpha", "gain", "beta", "shift")),
}
RESIDUALS = ("plain", "rezero", "skipinit", "fixup", "layerscale", "scaled", "nf", "deepnorm")
WEIGHTS = ("plain", "standardized", "sigma")
_SETTING: dict[str, Callable[[Any], Any]] = {  # as the function that stands there has it
    "eps": lambda norm: norm.eps,
    "alpha": lambda norm: "learned" if isinstance(norm.alpha, nn.Parameter) else float(norm.alpha),
    "gain": lambda norm: norm.weight is not None,
    "bias": lambda norm: norm.bias is not None,
    "beta": lambda norm: norm.bias is not None,
    "shift": lambda norm: norm.shift is not None,
}
_HERE = Path(__file__).parent


def remote_config(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, with every value that follows from others written out; token ids and the dtype are
    the caller's. ConfigError for what the code here does not know."""
    plan, depth = resolve_plan(config), config.depth
    for key, value, known in (("residual.scheme", plan.residual, RESIDUALS), ("weights", plan.weights, WEIGHTS)):
        if value not in known:
            raise ConfigError(
                f"model.{key}: {value} has no exported form; write one in tools/exported, or use {', '.join(known)}"
            )
    joints = build_residual(plan.residual, config, 0)
    first, sites = (_sites(plan.of_block(index, depth), config) for index in (0, depth - 1))
    first_sites = {site: first[site] for site in first if site in BLOCK_SITES}
    if first == sites:
        first_sites = {}
    return {
        "architectures": ["EquipoiseForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_equipoise.EquipoiseConfig",
            "AutoModelForCausalLM": "modeling_equipoise.EquipoiseForCausalLM",
        },
        "model_type": "equipoise",
        "trunk": config.trunk,
        "sites": sites,
        "first_sites": first_sites,
        "first_blocks": 0 if first == sites else plan.first_count(depth),
        "residual": plan.residual,
        "residual_constant": 1.0 if joints is None else joints.constant,
        "weights": plan.weights,
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


def _sites(plan: NormPlan, config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The functions at the sites of a block and around the blocks, with all their settings, as both ``model.sites`` and
    the exported code read them."""
    return {site: _settings(site, plan, config) for site in plan.sites}


def _settings(site: str, plan: NormPlan, config: ModelConfig) -> dict[str, Any]:
    built, entry = plan.build(site, 1, config), plan.sites[site]
    given = {"function": entry} if isinstance(entry, str) else entry
    function = given["function"]
    if function not in SETTINGS:
        raise ConfigError(
            f"model.sites.{site}: {function} has no exported form; write one in tools/exported, or use "
            + ", ".join(SETTINGS)
        )
    for key in given.keys() - {"function", "eps", *SETTINGS[function]}:  # who needs no eps takes no notice of one
        raise ConfigError(f"model.sites.{site}: {key} of {function} has no exported form; write one in tools/exported")
    return {"function": function} | {key: _SETTING[key](built) for key in SETTINGS[function]}


def defaults() -> dict[str, Any]:
    """What a config.json means that lacks a key. Read from EquipoiseConfig as text: to import it takes transformers."""
    tree = ast.parse((_HERE / "configuration_equipoise.py").read_text(encoding="utf-8"))
    (described,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    found: dict[str, Any] = {}
    for node in [node for node in described.body if isinstance(node, ast.AnnAssign)]:
        assert node.value is not None, "EquipoiseConfig has a default for every key"
        # what is no literal is an empty dict
        found[ast.unparse(node.target)] = {} if isinstance(node.value, ast.Call) else ast.literal_eval(node.value)
    return found


def remote_code_files(config: ModelConfig) -> dict[str, bytes]:
    """File name -> content of the code that runs ``remote_config(config)``, the same for every configuration that it
    can run; ConfigError for another."""
    remote_config(config)
    # transformers knows the files of a folder by their relative imports
    return {name: (_HERE / name).read_bytes().replace(b"from tools.exported.", b"from .") for name in CODE}
