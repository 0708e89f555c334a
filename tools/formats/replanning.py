"""A trained model with the norms of another plan, so that training can go on with these.

A site of the new plan takes over the gain and the shift that the model has at that site; one that is new starts at
gain 1. alpha has no counterpart in a norm that divides by a statistic, so it starts anew: ``measured`` is 1 / standard
deviation of what reaches the site. RMSNorm divides every token by its own root mean square and DyT all of them by
one number, so the model that comes out is not the one that went in, and has to be trained on; both losses are told.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console

from models import ModelConfig, Transformer, parameter_roles
from models.config import AlphaConfig
from models.errors import ConfigError
from models.initialization import first_rows, measure_alpha
from models.norms import NORMS
from models.plan import BLOCK_SITES, resolve_plan
from pretrain.batch import Batch
from pretrain.cli import build, merge
from pretrain.config import RunConfig
from tools.formats.lazy import LazyTensor, filled
from tools.formats.text import real_text, targets
from tools.formats.verification import transformer
from tools.formats.weights import Weights, complain_of, on_meta, parameter_shapes

_RULES = ("measured", "role", "width")
_SCALE = "embedding_scale"
_KEYS = ("sites", "first_sites", "first_blocks", _SCALE, "alpha.target", "alpha.attention", "alpha.other")


def replanned(weights: Weights, plan: str, alpha: str | None, changes: Mapping[str, Any]) -> Weights:
    """``weights`` at step 0 of a run with the norms of ``plan``, without optimizer state.

    ``alpha`` is a rule of model.alpha or a number; None is measured. ``changes`` are keys of model.sites,
    model.embedding_scale and model.alpha. A learnable embedding scale that the model did not have starts at 1, so that
    its embeddings mean what they meant. ConfigError if anything that the model has learned has no place in the plan.

    alpha is measured on training text, as a run does at its start, and the losses on held-out text: that of
    ``data.path`` if the run has one, otherwise on a novel. For these the model is in memory whole, once, in fp32.
    """
    old, seed = weights.config.model, weights.config.seed
    config = _configured(weights, plan, alpha, changes)
    new, roles = config.model, parameter_roles(on_meta(config.model))
    tensors: dict[str, LazyTensor] = {}
    for name, shape in parameter_shapes(new).items():
        if name in weights.model and roles[name] != "alpha":
            tensors[name] = weights.model[name]
        elif name == _SCALE:
            tensors[name] = filled(1.0, shape, torch.float32)
        else:
            start = partial(first_rows, name, roles[name], torch.Size(shape), range(shape[0]), new, seed)
            tensors[name] = LazyTensor(shape, torch.float32, start)
    text = real_text(weights)
    console, chunk = Console(stderr=True), config.train.loss_chunk
    with console.status("loss of the model as it is"):
        before = _loss(transformer(old, weights.model), text.held_out, chunk)
    with console.status(f"loss with the norms of {plan}"):
        model = transformer(new, tensors)
        alphas = [name for name in tensors if roles[name] == "alpha"]
        if alphas and new.alpha.rule == "measured":
            batch = text.calibration
            found = measure_alpha(model, lambda: _nats(model, batch, chunk), new.alpha.target)
            for site, value in found.items():
                tensors[f"{site}.alpha"] = filled(value, (1,), torch.float32)
        after = _loss(model, text.held_out, chunk)
    added = sorted({place.split(".")[-1] for place in _places(new).keys() - _places(old).keys()})
    notes = [f"plan {old.plan} to {plan}, at step 0: gains and shifts are the model's own"]
    notes += [f"new at {', '.join(added)}: gain 1"] if added else []
    if alphas:
        notes.append(_ranges({name: tensors[name].read().item() for name in alphas}, new, text.calibration_name))
    notes.append(f"loss on {text.held_out_name}: {before:.4f} nats a token before, {after:.4f} now")
    return dataclasses.replace(
        weights,
        config=config,
        model=tensors,
        step=0,
        data=text.state,
        optimizer=None,
        notes=(*weights.notes, *notes),
    )


def _configured(weights: Weights, plan: str, alpha: str | None, changes: Mapping[str, Any]) -> RunConfig:
    """The run's configuration with the new norms. ConfigError if they have no place for what the model has."""
    old = weights.config.model
    _check_keys(changes)
    tree = dataclasses.asdict(weights.config)
    of_norms: dict[str, Any] = {"plan": plan, "sites": {}, "first_sites": {}, "first_blocks": None}
    tree["model"] |= {**of_norms, "alpha": dataclasses.asdict(AlphaConfig())}
    config = build(merge(tree, {"model": dict(changes)}), "command line")
    new = dataclasses.replace(config.model, sites=_with_shifts(config.model, weights.model))
    _check_places(old, new)
    shapes, roles = parameter_shapes(new), parameter_roles(on_meta(old))
    lost = {name for name in weights.model if name not in shapes and roles[name] != "alpha"}
    complain_of(lost & {_SCALE}, f"--plan {plan} lacks", f"write --model.{_SCALE} learned")
    complain_of(
        lost, f"--plan {plan} has no place for", "choose another plan, or --model.sites with functions that have it"
    )
    if "alpha" in parameter_roles(on_meta(new)).values():
        start = dataclasses.replace(new.alpha, **_parsed("measured" if alpha is None else alpha))
        new = dataclasses.replace(new, alpha=start)
    elif alpha is not None:
        raise ConfigError(f"--alpha: no site of plan {plan!r} has one that is learned; leave it out")
    return dataclasses.replace(config, model=new)


def _check_places(old: ModelConfig, new: ModelConfig) -> None:
    """ConfigError if ``new`` has no function where ``old`` has one, or is another model than that in more."""
    there, here = _places(old), _places(new)
    for place, function in there.items():
        if place not in here:
            raise ConfigError(
                f"--plan {new.plan} has nothing at {place}, where the model has {function}: choose another plan, or "
                f"write --model.sites '{{{place.split('.')[-1]}: FUNCTION}}' too"
            )
    keys = ["residual", "weights"]
    keys += ["qk_scope"] if any(place.endswith((".query", ".key", ".value")) for place in there) else []
    for key in keys:
        mine, wanted = (getattr(resolve_plan(config), key) for config in (old, new))
        if mine != wanted:
            raise ConfigError(
                f"--plan {new.plan} changes more than functions: {key} is {mine} in the model and {wanted} in the "
                "plan; choose another"
            )


def _places(config: ModelConfig) -> dict[str, str]:
    """Where the model has a function, as ``blocks.0.attn_in``, and its name."""
    plan = resolve_plan(config)
    found = {site: plan.sites[site] for site in ("embed", "final") if site in plan.sites}
    for index in range(config.depth):
        sites = plan.of_block(index, config.depth).sites
        found |= {f"blocks.{index}.{site}": sites[site] for site in BLOCK_SITES if site in sites}
    return {place: entry if isinstance(entry, str) else entry["function"] for place, entry in found.items()}


def _check_keys(changes: Mapping[str, Any]) -> None:
    given = [key for key in changes if key != "alpha"] + [f"alpha.{key}" for key in changes.get("alpha", {})]
    for key in given:
        if key not in _KEYS:
            remedy = "write --alpha" if key.startswith("alpha.") else "it is what the weights are"
            raise ConfigError(f"command line: --model.{key} does not go with --plan: {remedy}")


def _parsed(alpha: str) -> dict[str, Any]:
    """Keys of model.alpha."""
    if alpha in _RULES:
        return {"rule": alpha}
    try:
        value = float(alpha)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"--alpha is {alpha!r}: write {', '.join(_RULES)} or a positive number")
    return {"rule": "constant", "constant": value}


def _with_shifts(new: ModelConfig, model: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """``new.sites``, with beta where the model has a shift and the plan a function that can have one."""
    on_meta(new)  # complains of unknown functions
    shifted = {name.split(".")[-2] for name in model if name.endswith(".bias")}
    sites = dict(new.sites)
    for site, entry in resolve_plan(new).sites.items():
        settings = {"function": entry} if isinstance(entry, str) else dict(entry)
        if site in shifted and "beta" in inspect.signature(NORMS[settings["function"]]).parameters:
            sites[site] = {"beta": True} | settings
    return sites


def _nats(model: Transformer, batch: Batch, chunk: int) -> torch.Tensor:
    total: torch.Tensor = model(batch.inputs, batch.targets, batch.documents, loss_chunk=chunk)[1]
    return total


@torch.no_grad()
def _loss(model: Transformer, batches: list[Batch], chunk: int) -> float:
    """Nats a target."""
    return sum(_nats(model, batch, chunk).item() for batch in batches) / targets(batches)


def _ranges(alphas: Mapping[str, float], config: ModelConfig, text: str) -> str:
    """The least and the greatest alpha of each kind of site."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, value in alphas.items():
        kinds[name.split(".")[-2]].append(value)
    ranges = {site: sorted({f"{min(values):.3g}", f"{max(values):.3g}"}, key=float) for site, values in kinds.items()}
    how = f", {config.alpha.target:g} / std on {text}" if config.alpha.rule == "measured" else ""
    return f"alpha{how}: " + ", ".join(f"{site} {' to '.join(ends)}" for site, ends in ranges.items())
