"""NormPlan: which function stands at which site. LLaMA, GPT, DyT, DNT and a reader's own idea are rows of one table.

With the residual stream x, a block is::

    a = attn_in(x);  q, k, v = Wq a, Wk a, Wv a;  q, k = query(q), key(k)
    x = x + attn_out( Wo . attn_mid( attention(q, k, v) ) )
    m = mlp_in(x);   x = x + mlp_out( W2 . mlp_mid( act(W1 m) ) )

``embed`` stands after the embedding (and the learned positions), ``final`` before the head. A site without an entry
is the identity and costs nothing: no module, no parameter, no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from models.config import ModelConfig
from models.errors import ConfigError, nearest
from models.norms import build_norm

BLOCK_SITES = ("attn_in", "query", "key", "attn_mid", "attn_out", "mlp_in", "mlp_mid", "mlp_out")
SITES = ("embed", *BLOCK_SITES, "final")
ATTENTION_SITES = ("attn_in", "query", "key", "attn_mid", "attn_out")  # alpha rules tell these from the others


@dataclass(frozen=True)
class NormPlan:
    """A row of the table. ``sites`` maps a site to a function's name, or to its name and settings."""

    sites: Mapping[str, str | Mapping[str, Any]]
    embedding_scale: bool = False
    qk_scope: Literal["head", "projection"] = "head"

    def build(self, site: str, features: int, config: ModelConfig) -> nn.Module | None:
        """The module at ``site`` over ``features`` features, or None for the identity."""
        entry = self.sites.get(site)
        if entry is None:
            return None
        settings: dict[str, Any] = {"function": entry} if isinstance(entry, str) else dict(entry)
        function = settings.pop("function", None)
        if not isinstance(function, str):
            raise ConfigError(f"model.sites.{site}: name a function, e.g. {{function: rmsnorm}}")
        if function == "layernorm":
            settings.setdefault("bias", config.bias)
        return build_norm(function, features, {"eps": config.norm_eps} | settings, site)


def _sites(function: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), function)


_PRE = "attn_in mlp_in final"

PLANS: dict[str, NormPlan] = {
    "llama": NormPlan(_sites("rmsnorm", _PRE)),
    "gpt": NormPlan(_sites("layernorm", _PRE)),
    # The embedding scale is part of the method: without it the first tanh sees inputs far below 1/alpha
    # (arXiv 2503.10622, section 5; facts of the released code: one scalar, learnable, initially sqrt(width)).
    "dyt": NormPlan(_sites("dyt", _PRE), embedding_scale=True),
    "derf": NormPlan(_sites("derf", _PRE), embedding_scale=True),
    # arXiv 2507.17501, ablation setting S5: the norm before the feed-forward is dropped.
    "dnt": NormPlan(_sites("rmsnorm", "embed attn_in query key attn_out mlp_out final")),
    "dnt-s1": NormPlan(_sites("rmsnorm", _PRE)),
    "dnt-s2": NormPlan(_sites("rmsnorm", "attn_in query key mlp_in final")),
    "dnt-s3": NormPlan(_sites("rmsnorm", "embed attn_in query key mlp_in final")),
    "dnt-s4": NormPlan(_sites("rmsnorm", "embed attn_in query key attn_out mlp_in mlp_out final")),
    "peri": NormPlan(_sites("rmsnorm", "embed attn_in attn_out mlp_in mlp_out final")),  # arXiv 2502.02732
    "sandwich": NormPlan(_sites("rmsnorm", "attn_in attn_out mlp_in mlp_out final")),  # arXiv 2105.13290
    "sub-ln": NormPlan(_sites("rmsnorm", "attn_in attn_mid mlp_in mlp_mid final")),  # arXiv 2210.06423
    "olmo2": NormPlan(  # arXiv 2501.00656: no norm before the branches, query and key over all heads together
        _sites("rmsnorm", "query key attn_out mlp_out final"), qk_scope="projection"
    ),
    "none": NormPlan({}),
}


def resolve_plan(config: ModelConfig) -> NormPlan:
    """The plan that ``config`` names, with its changes of sites, embedding scale and query-key scope applied."""
    if config.plan not in PLANS:
        raise ConfigError(f"model.plan: no plan is called {config.plan!r}; {nearest(config.plan, PLANS)}")
    plan = PLANS[config.plan]
    sites = dict(plan.sites)
    for site, entry in config.sites.items():
        if site not in SITES:
            raise ConfigError(f"model.sites: there is no site {site!r}; {nearest(site, SITES)}")
        if entry is None or entry == "none":
            sites.pop(site, None)
        elif isinstance(entry, (str, dict)):
            sites[site] = entry
        else:
            raise ConfigError(f"model.sites.{site} is {entry!r}: write a function's name, e.g. rmsnorm, or none")
    if config.embedding_scale != "plan":
        plan = replace(plan, embedding_scale=config.embedding_scale == "learned")
    if config.qk_scope != "plan":
        plan = replace(plan, qk_scope=config.qk_scope)
    return replace(plan, sites=sites)
