"""NormPlan: which function stands at which site. LLaMA, GPT, DyT, DNT and a reader's own idea are rows of one table.

With the residual stream x, a block is::

    a = attn_in(x);  q, k, v = Wq a, Wk a, Wv a;  q, k, v = query(q), key(k), value(v)
    x = attn_post( x + attn_out( Wo . attn_mid( attention(q, k, v) ) ) )
    m = mlp_in(x);   x = mlp_post( x + mlp_out( W2 . mlp_mid( act(mlp_act(W1 m)) ) ) )

``embed`` stands after the embedding (and the learned positions), ``final`` before the head; with a gated activation
``mlp_act`` is the gate's alone. A site without an entry is the identity and costs nothing: no module, no parameter, no
kernel. Beside its sites a plan brings what else its method is made of: how branches join the stream (residual.py), what
linears make of their weights (weights.py), how weights start (initialization.py). Each of them is a setting as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

import models.elementwise  # noqa: F401  its functions enter the registry
from models.alpha import initial_alpha
from models.config import ModelConfig
from models.errors import ConfigError, nearest
from models.norms import build_norm

BLOCK_SITES = (
    "attn_in", "query", "key", "value", "attn_mid", "attn_out", "attn_post",
    "mlp_in", "mlp_act", "mlp_mid", "mlp_out", "mlp_post",
)  # fmt: skip
SITES = ("embed", *BLOCK_SITES, "final")

Entry = str | Mapping[str, Any]  # a function's name, or {function: name, and its settings}


@dataclass(frozen=True)
class NormPlan:
    """A row of the table. ``first`` is what ``sites`` are changed by in the first blocks, with None for nothing:
    ``first_blocks`` of them, or that share of the depth."""

    sites: Mapping[str, Entry]
    first: Mapping[str, Entry | None] = field(default_factory=dict)
    first_blocks: int | float = 0
    embedding_scale: bool = False
    qk_scope: Literal["head", "projection"] = "head"
    residual: str = "plain"
    weights: str = "plain"
    init: str = "standard"

    def first_count(self, depth: int) -> int:
        """Blocks that have ``first``: of a share the whole part, but at least one."""
        if isinstance(self.first_blocks, int):
            return min(self.first_blocks, depth)
        return max(1, int(self.first_blocks * depth)) if self.first_blocks > 0 else 0

    def of_block(self, index: int, depth: int) -> NormPlan:
        """The plan of one block: that of all, or of the first ones."""
        if index >= self.first_count(depth):
            return self
        return replace(self, sites=_without_none({**self.sites, **self.first}))

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
        if "alpha" in settings:
            settings["alpha"] = _alpha(settings["alpha"], site, config)
        return build_norm(function, features, {"eps": config.norm_eps} | settings, site)


def _without_none(sites: Mapping[str, Entry | None]) -> dict[str, Entry]:
    return {site: entry for site, entry in sites.items() if entry is not None}


def _alpha(value: Any, site: str, config: ModelConfig) -> Any:
    """``learned``, or the number at which alpha is fixed."""
    if value == "fixed":
        if config.alpha.rule == "measured":
            raise ConfigError(
                f"model.sites.{site}: alpha is fixed, and model.alpha.rule measured: what is measured is saved as a "
                "parameter, so write alpha: learned, alpha: NUMBER, or another rule"
            )
        return initial_alpha(site, config.width, config.alpha)
    if value != "learned" and not (isinstance(value, int | float) and value is not True and value > 0):
        raise ConfigError(f"model.sites.{site}: alpha is {value!r}: write learned, fixed or a positive number")
    return value


def _sites(function: Entry, names: str) -> dict[str, Entry]:
    return dict.fromkeys(names.split(), function)


_PRE = "attn_in mlp_in final"
_POST = "attn_post mlp_post"
_SHIFT = {"function": "identity", "alpha": 1.0, "gain": False, "shift": True}  # x + one learned number

PLANS: dict[str, NormPlan] = {
    "llama": NormPlan(_sites("rmsnorm", _PRE)),
    "gpt": NormPlan(_sites("layernorm", _PRE)),
    # The embedding scale is part of the method: without it the first tanh sees inputs far below 1/alpha
    # (arXiv 2503.10622, section 5; facts of the released code: one scalar, learnable, initially sqrt(width)).
    "dyt": NormPlan(_sites("dyt", _PRE), embedding_scale=True),
    "derf": NormPlan(_sites("derf", _PRE), embedding_scale=True),
    "hardtanh": NormPlan(_sites("hardtanh", _PRE), embedding_scale=True),
    "sigmoid": NormPlan(_sites("sigmoid", _PRE), embedding_scale=True),
    "softsign": NormPlan(_sites("softsign", _PRE), embedding_scale=True),
    "isru": NormPlan(_sites("isru", _PRE), embedding_scale=True),
    "identity": NormPlan(_sites("identity", _PRE), embedding_scale=True),
    # arXiv 2507.17501, ablation setting S5: the norm before the feed-forward is dropped.
    "dnt": NormPlan(_sites("rmsnorm", "embed attn_in query key attn_out mlp_out final")),
    "dnt-s1": NormPlan(_sites("rmsnorm", _PRE)),
    "dnt-s2": NormPlan(_sites("rmsnorm", "attn_in query key mlp_in final")),
    "dnt-s3": NormPlan(_sites("rmsnorm", "embed attn_in query key mlp_in final")),
    "dnt-s4": NormPlan(_sites("rmsnorm", "embed attn_in query key attn_out mlp_in mlp_out final")),
    "peri": NormPlan(_sites("rmsnorm", "embed attn_in attn_out mlp_in mlp_out final")),  # arXiv 2502.02732
    "sandwich": NormPlan(_sites("rmsnorm", "attn_in attn_out mlp_in mlp_out final")),  # arXiv 2105.13290
    # arXiv 2210.06423, whose first weights are part of the method.
    "sub-ln": NormPlan(_sites("rmsnorm", "attn_in attn_mid mlp_in mlp_mid final"), init="magneto"),
    "olmo2": NormPlan(  # arXiv 2501.00656: no norm before the branches, query and key over all heads together
        _sites("rmsnorm", "query key attn_out mlp_out final"), qk_scope="projection"
    ),
    # The first Transformer's order (arXiv 1706.03762). The last norm of the stream is the one before the head.
    "post": NormPlan(_sites("rmsnorm", _POST)),
    # arXiv 2203.00555. Its embedding is multiplied by sqrt(width), a constant; here that is the learnable scale.
    "deepnorm": NormPlan(_sites("rmsnorm", _POST), embedding_scale=True, residual="deepnorm", init="deepnorm"),
    # arXiv 2412.13795: the first quarter of the blocks is post-norm.
    "mix-ln": NormPlan(
        _sites("rmsnorm", _PRE), first={"attn_in": None, "mlp_in": None, **_sites("rmsnorm", _POST)}, first_blocks=0.25
    ),
    # arXiv 2503.04598: the feed-forward's norm is one of the stream, z = norm(x + attention), then z + mlp(z).
    "hybridnorm": NormPlan(_sites("rmsnorm", "query key value attn_post final")),
    # HybridNorm*: the first block has pre-norms in place of that, and keeps the norms of query, key and value.
    "hybridnorm-star": NormPlan(
        _sites("rmsnorm", "query key value attn_post final"),
        first={"attn_post": None, **_sites("rmsnorm", "attn_in mlp_in")},
        first_blocks=1,
    ),
    "none": NormPlan({}),
    # Without any norm. PyTorch's default weights are those of ReZero's code, the others take the same; the embedding
    # scale gives all of them a stream that begins at variance 1, which NF counts on.
    "rezero": NormPlan({}, embedding_scale=True, residual="rezero", init="torch"),  # arXiv 2003.04887
    "skipinit": NormPlan({}, embedding_scale=True, residual="skipinit", init="torch"),  # arXiv 2002.10444
    "nf": NormPlan({}, embedding_scale=True, residual="nf", weights="standardized", init="torch"),  # arXiv 2101.08692
    "sigma-reparam": NormPlan({}, embedding_scale=True, weights="sigma", init="torch"),  # arXiv 2303.06296
    # arXiv 1901.09321 and its code for fairseq: shifts before attention, both linears, the activation and the head.
    "fixup": NormPlan(
        _sites(_SHIFT, "attn_in mlp_in mlp_act mlp_mid final"), embedding_scale=True, residual="fixup", init="fixup"
    ),
    "t-fixup": NormPlan({}, embedding_scale=True, init="t-fixup"),  # Huang et al., ICML 2020: first weights alone
}


def resolve_plan(config: ModelConfig) -> NormPlan:
    """The plan that ``config`` names, with its changes applied."""
    if config.plan not in PLANS:
        raise ConfigError(f"model.plan: no plan is called {config.plan!r}; {nearest(config.plan, PLANS)}")
    plan = PLANS[config.plan]
    changes: dict[str, Any] = {"sites": _without_none({**plan.sites, **_changes(config.sites, "sites", SITES)})}
    if config.first_blocks is not None:
        changes["first_blocks"] = config.first_blocks
    if config.first_sites:
        changes["first"] = {**plan.first, **_changes(config.first_sites, "first_sites", BLOCK_SITES)}
    if config.embedding_scale != "plan":
        changes["embedding_scale"] = config.embedding_scale == "learned"
    if config.qk_scope != "plan":
        changes["qk_scope"] = config.qk_scope
    for key, value in (("residual", config.residual.scheme), ("weights", config.weights), ("init", config.init.rule)):
        if value != "plan":
            changes[key] = value
    plan = replace(plan, **changes)
    if config.first_sites and not plan.first_count(config.depth):
        raise ConfigError("model.first_sites change nothing with no first blocks: write model.first_blocks too")
    return plan


def _changes(given: Mapping[str, Any], key: str, sites: tuple[str, ...]) -> dict[str, Entry | None]:
    for site, entry in given.items():
        if site not in sites:
            raise ConfigError(f"model.{key}: there is no site {site!r}; {nearest(site, sites)}")
        if not (entry is None or isinstance(entry, str | dict)):
            raise ConfigError(f"model.{key}.{site} is {entry!r}: write a function's name, e.g. rmsnorm, or none")
    return {site: None if entry == "none" else entry for site, entry in given.items()}
