"""The gains of norms folded into the linears that read them, for inference: one multiplication less at each site.

Of ``y = g * n(x) + b`` a linear makes ``W y + c = (W g) n(x) + (c + W b)``: the gain multiplies the columns of W, and
the shift, where there is one, becomes part of the linear's bias. ``model.sites`` then says ``gain: false``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import ModelConfig
from models.elementwise import Elementwise
from models.errors import ConfigError
from models.norms import NORMS
from models.plan import BLOCK_SITES, SITES, resolve_plan
from pretrain.files import write_synced
from tools.formats.lazy import LazyTensor, cast
from tools.formats.weights import Weights, parameter_shapes

# Site -> the linears that read it, if the model has them, and nothing else does.
_READERS = {
    "attn_in": ("attention.q", "attention.k", "attention.v"),
    "attn_mid": ("attention.out",),
    "mlp_in": ("feedforward.gate", "feedforward.up"),
    "mlp_mid": ("feedforward.down",),
    "final": ("head",),
}
_MODULES = {site: f"attention.{site}" for site in ("query", "key", "value", "attn_mid")}
_MODULES |= {site: f"feedforward.{site}" for site in ("mlp_act", "mlp_mid")}


def fold(weights: Weights, dtype: torch.dtype | None) -> tuple[Weights, str]:
    """(the same function with all gains folded that can be, a sentence about which were and why others not).

    Products are made in fp32 or wider when they are read, and then have ``dtype``, or that of their linear for None.
    ConfigError if there is nothing to fold.
    """
    config, model = weights.config.model, dict(weights.model)
    changes: dict[str, dict[str, Any]] = {"sites": {}, "first_sites": {}}
    folded: dict[str, list[str]] = {}
    left: dict[str, list[str]] = {}
    for site in SITES:
        for key, settings, prefixes in _places(site, config):
            name = site if key == "sites" else f"{site} of the first blocks"
            module = _MODULES.get(site, site)
            parts = [part for part in ("weight", "bias") if f"{prefixes[0]}{module}.{part}" in model]
            readers = [reader for reader in _READERS.get(site, ()) if f"{prefixes[0]}{reader}.weight" in model]
            biased = all(f"{prefixes[0]}{reader}.bias" in model for reader in readers)
            if reason := _obstacle(site, settings["function"], config, parts, readers, biased):
                left.setdefault(reason, []).append(name)
                continue
            for prefix in prefixes:
                _fold_site(model, prefix + module, [prefix + reader for reader in readers], dtype)
            shift = {_shift_setting(settings["function"]): False} if "bias" in parts else {}
            changes[key][site] = settings | shift | {"gain": False}
            kind = {("weight",): "gains", ("weight", "bias"): "gains and shifts", ("bias",): "shifts"}[tuple(parts)]
            folded.setdefault(kind, []).append(name)
    rest = ", ".join(f"{', '.join(names)} ({reason})" for reason, names in left.items())
    if not folded:
        raise ConfigError(f"--fold-gains: there is nothing to fold; {rest or 'there are no norms'}: leave it out")
    note = ", ".join(f"{kind} of {', '.join(names)}" for kind, names in folded.items())
    note += " folded into the next linears" + (f"; left: {rest}" if rest else "")
    config = replace(config, **{key: getattr(config, key) | sites for key, sites in changes.items()})
    assert list(model) == list(parameter_shapes(config)), "folding left what the configuration does not have"
    return replace(weights, config=replace(weights.config, model=config), model=model), note


def _places(site: str, config: ModelConfig) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Where something stands at ``site``: (sites or first_sites, what, the prefixes of the parameters' names)."""
    plan, depth = resolve_plan(config), config.depth
    prefixes = [f"blocks.{index}." for index in range(depth)] if site in BLOCK_SITES else [""]
    count = plan.first_count(depth) if site in BLOCK_SITES else 0
    entry, first = plan.sites.get(site), plan.of_block(0, depth).sites.get(site)
    if not count or entry == first:
        found = [("sites", entry, prefixes)]
    else:
        found = [("first_sites", first, prefixes[:count]), ("sites", entry, prefixes[count:])]
    return [
        (key, {"function": there} if isinstance(there, str) else dict(there), names)
        for key, there, names in found
        if there is not None and names
    ]


def note_in(folder: Path, note: str) -> None:
    """Puts ``note`` at the head of ``folder``'s config.yaml, where a person sees it, as a comment."""
    path = folder / "config.yaml"
    write_synced(path, f"# {note}\n".encode() + path.read_bytes())


def _obstacle(site: str, function: str, config: ModelConfig, parts: list[str], readers: list[str], biased: bool) -> str:
    """Why a site is left as it is; "" if it can be folded."""
    kind = resolve_plan(config).weights
    if not parts:
        return "no gain there"
    if site not in _READERS:
        return "no linear comes next"
    if not readers:
        return "the head is tied"
    if kind != "plain" and readers != ["head"]:
        return f"the next linear's weight is {kind}"
    if _shift_setting(function) is None:
        return f"what {function} does with its gain is not known here"
    if "bias" in parts and not biased:
        return "the next linear has no bias for its shift"
    return ""


def _shift_setting(function: str) -> str | None:
    """The setting that leaves out the shift, "" if there never is one; None unless the last that ``function`` does is
    to multiply by its gain and add its shift."""
    if NORMS[function].forward is Elementwise.forward:
        return "beta"
    return {"rmsnorm": "", "layernorm": "bias"}.get(function)


def _fold_site(model: dict[str, LazyTensor], norm: str, readers: list[str], dtype: torch.dtype | None) -> None:
    gain, shift = model.pop(f"{norm}.weight", None), model.pop(f"{norm}.bias", None)
    for reader in readers:
        weight = model[f"{reader}.weight"]
        if shift is not None:
            name = f"{reader}.bias"
            model[name] = cast(_shifted(model[name], weight, shift), dtype or model[name].dtype, name)
        if gain is not None:
            name = f"{reader}.weight"
            model[name] = cast(_scaled(weight, gain), dtype or weight.dtype, name)


def _scaled(weight: LazyTensor, gain: LazyTensor) -> LazyTensor:
    """``weight`` [out, in] with its columns multiplied by ``gain`` [in]."""
    wide = _wide(weight, gain)

    def read() -> Tensor:
        return weight.read().to(wide).mul_(gain.read().to(wide))

    return LazyTensor(weight.shape, wide, read)


def _shifted(bias: LazyTensor, weight: LazyTensor, shift: LazyTensor) -> LazyTensor:
    """``bias + weight @ shift`` for bias [out], weight [out, in] and shift [in]."""
    wide = _wide(bias, weight, shift)

    def read() -> Tensor:
        return torch.addmv(bias.read().to(wide), weight.read().to(wide), shift.read().to(wide))

    return LazyTensor(bias.shape, wide, read)


def _wide(*tensors: LazyTensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
