"""Recipes that are known to fail, told before they cost anything: a line each, with what to write instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.alpha import ATTENTION_SITES, initial_alpha
from models.config import ModelConfig
from models.elementwise import Elementwise, Identity
from models.initialization import weight_std
from models.norms import NORMS
from models.plan import NormPlan, resolve_plan
from models.residual import LEARNED, initial_scale

# Of alpha times the standard deviation of what the first DyT reads. The DyT paper's own models have from 0.36 (width
# 8192) to 1.03 (4096); 0.02, an embedding without its scale, is what others trained and saw fail (arXiv 2604.23434).
_FAINT = 0.1
# Of weights' std times sqrt(width): 0.64 is the paper's smallest (width 1024), 0.23 failed (docs/results.md).
_WEAK = 0.6


def known_failures(config: ModelConfig) -> list[str]:
    """Of elementwise functions where norms would be; [] for a recipe of which nothing bad is known."""
    plan = resolve_plan(config)
    functions = _functions(plan.of_block(config.depth - 1, config.depth))
    lines = list(_of_functions(config, functions))
    readers = [functions[site] for site in ("attn_in", "mlp_in") if site in functions]
    if readers:  # what a branch reads has not been divided by a statistic
        lines += _of_starts(config, plan, readers[0])
    return lines


def _functions(plan: NormPlan) -> dict[str, str]:
    """Site -> elementwise function, without Fixup's shifts, which neither bound nor scale."""
    found = {}
    for site, entry in plan.sites.items():
        settings: Mapping[str, Any] = {"function": entry} if isinstance(entry, str) else entry
        name = settings["function"]
        is_shift = name == "identity" and not settings.get("gain", True)
        if issubclass(NORMS[name], Elementwise) and not is_shift:
            found[site] = name
    return found


def _of_functions(config: ModelConfig, functions: Mapping[str, str]) -> Iterator[str]:
    unbounded = [site for site, name in functions.items() if NORMS[name] is Identity]
    if unbounded:
        yield (
            f"identity at {', '.join(unbounded)} bounds nothing, and training failed with it in the DyT paper "
            "(arXiv 2503.10622, section 6): write another function"
        )
    if "final" in functions and config.width < 1024:
        yield (
            f"{functions['final']} before the head of width {config.width}: all of the gradient passes through it, and "
            "at width 128 that costs more than anything else (docs/results.md): write --model.sites.final none"
        )
    both = len({site in ATTENTION_SITES for site in functions}) == 2
    if both and config.alpha.rule == "constant" and config.width >= 2048:
        yield (
            f"one alpha, {config.alpha.constant:g}, at all sites of width {config.width}; from 2048 on attention takes "
            "a larger one than the others (arXiv 2503.10622, table 11): write --model.alpha.rule width"
        )


def _of_starts(config: ModelConfig, plan: NormPlan, function: str) -> Iterator[str]:
    init, width = config.init, config.width
    std = weight_std("embedding.weight", "embedding", (1, width), config)
    std *= width**0.5 if plan.embedding_scale else 1.0
    seen = std * initial_alpha("attn_in", width, config.alpha)
    if seen < _FAINT and "embed" not in plan.sites and config.alpha.rule != "measured":
        yield (
            f"the first {function} reads an embedding of std {std:.2g}, {seen:.2g} with alpha, and the model hardly "
            "learns: write --model.embedding_scale learned, or --model.init.embedding_std 1"
        )
    if plan.init == "fixup":
        yield (
            f"the branches' output projections start at zero, which hurts {function} (arXiv 2503.10622): write "
            "--model.init.rule standard"
        )
    elif plan.residual in LEARNED and initial_scale(plan.residual, config) == 0:
        yield (
            f"the branches start at zero ({plan.residual}), which hurts {function} as output projections of zero do "
            "(arXiv 2503.10622): write --model.residual.initial 1, or --model.residual.scheme plain"
        )
    weak = plan.init == "standard" and init.std != "fan_in" and init.std * width**0.5 < _WEAK
    normed = {"attn_out", "mlp_out"} <= plan.sites.keys() or plan.weights != "plain"
    if weak and width < 1024 and not normed:
        yield (
            f"weights of std {init.std:g} at width {width}: without a norm the branches add almost nothing, and the "
            "loss stays at that of unigrams (docs/results.md): write --model.init.std fan_in"
        )
