"""ModelConfig: everything that determines a model's function and its first weights, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from models.errors import ConfigError


def setting(default: Any, help: str, *, unit: str = "") -> Any:
    """A dataclass field that documents itself: ``--help`` prints ``help`` and ``unit`` beside type and default."""
    metadata = {"help": help, "unit": unit}
    if isinstance(default, type):  # a nested section, or an empty container
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class AlphaConfig:
    """How the alphas of DyT and its like start (alpha.py has the rules)."""

    rule: Literal["constant", "role", "width", "measured"] = setting(
        "width",
        "constant: one value; role: attention and other sites apart; width: by role from the DyT paper's table; "
        "measured: target / standard deviation of each site's input on one calibration batch",
    )
    constant: float = setting(0.5, "alpha at every site, for rule constant")
    attention: float = setting(0.8, "alpha at the attention sites, for rule role")
    other: float = setting(0.2, "alpha at the other sites, for rule role")
    target: float = setting(1.0, "alpha times the standard deviation of its input, for rule measured")


@dataclass(frozen=True)
class InitConfig:
    """How weights start, by role (initialization.py has the rules)."""

    rule: Literal["plan", "standard", "torch", "fixup", "t-fixup", "deepnorm", "magneto"] = setting(
        "plan",
        "what gives each weight its std; standard: std and depth_scaled_output below; torch: as PyTorch's linears "
        "start; the others as their papers have it; plan: as the norm plan has it, mostly standard",
    )
    distribution: Literal["normal", "trunc_normal", "uniform"] = setting(
        "normal", "shape of the distribution; trunc_normal cuts at two standard deviations, uniform has the same std"
    )
    std: float | Literal["fan_in"] = setting(0.02, "of the matrices, for rule standard; fan_in is 1/sqrt(input width)")
    embedding_std: float | None = setting(None, "of the embeddings; null is 0.02, or as the rule has it")
    head_std: float | None = setting(None, "of an untied head; null is as the matrices, or as the rule has it")
    depth_scaled_output: bool = setting(
        True,
        "divide the std of the branches' output projections by sqrt(2*depth), as GPT-2 does; for rule standard",
    )


@dataclass(frozen=True)
class ResidualConfig:
    """How a branch joins the residual stream (residual.py has the schemes)."""

    scheme: Literal["plan", "plain", "rezero", "skipinit", "fixup", "layerscale", "scaled", "nf", "deepnorm"] = setting(
        "plan", "plain: x + f(x); the others multiply branch or stream; plan: as the norm plan has it"
    )
    initial: float | None = setting(
        None,
        "first value of the learned scales of rezero, skipinit and nf (null: 0), fixup (null: 1) and layerscale (null: "
        "0.1, or less from depth 19 on)",
    )
    constant: float | None = setting(
        None,
        "what multiplies the branch in nf (null: 0.2) and scaled (null: 1/sqrt(2*depth)), or the stream in deepnorm "
        "(null: (2*depth)**(1/4))",
    )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: sizes, trunk, norm plan, initialization.

    A null means "follow from the rest"; the properties at the end say how.
    """

    plan: str = setting("dnt", "which norm stands at which site: a named plan (models/plan.py)")
    sites: dict[str, Any] = setting(
        dict, "changes to the plan, site: function, {function: ..., settings} or none; e.g. {mlp_mid: rmsnorm}"
    )
    first_blocks: int | float | None = setting(
        None,
        "how many of the first blocks have sites of their own: a number, or a share of the depth below 1; null: as the "
        "plan has it, 0.25 for mix-ln, 1 for hybridnorm-star, 0 for the others",
        unit="blocks",
    )
    first_sites: dict[str, Any] = setting(dict, "changes to the sites of the first blocks alone, written as sites are")
    residual: ResidualConfig = setting(ResidualConfig, "how a branch joins the residual stream")
    weights: Literal["plan", "plain", "standardized", "sigma"] = setting(
        "plan",
        "what the blocks' linears make of their weights; standardized: scaled weight standardization; sigma: spectral "
        "norm times a learned gain; plan: as the norm plan has it, mostly plain",
    )
    trunk: Literal["llama", "gpt"] = setting(
        "llama", "llama: RoPE, SwiGLU, untied head; gpt: learned positions, GELU, tied head"
    )
    width: int = setting(128, "of the residual stream", unit="features")
    depth: int = setting(6, "number of blocks", unit="blocks")
    heads: int = setting(4, "attention heads", unit="heads")
    kv_heads: int | None = setting(None, "key and value heads (grouped-query attention); null: heads", unit="heads")
    ffn_width: int | None = setting(
        None, "null: 4*width for gpt, 8/3*width rounded up to a multiple of 64 for llama", unit="features"
    )
    vocab_size: int | None = setting(None, "null: as many as the tokenizer has", unit="pieces")
    context: int = setting(1024, "the longest sequence the model accepts", unit="tokens")
    bias: bool = setting(False, "biases in linears and LayerNorms")
    tied: bool | None = setting(None, "head shares the embedding's weight; null: yes for gpt, no for llama")
    embedding_scale: Literal["plan", "none", "learned"] = setting(
        "plan", "a learnable scalar, initially sqrt(width), after the embedding; plan: dyt and the like have it"
    )
    qk_scope: Literal["plan", "head", "projection"] = setting(
        "plan", "features that the query, key and value norms see: one head, or the whole projection as in OLMo 2"
    )
    dropout: float = setting(0.0, "probability, after the embedding and each branch")
    norm_eps: float = setting(1e-5, "epsilon of the norms")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies")
    alpha: AlphaConfig = setting(AlphaConfig, "initial alpha of DyT and its like")
    init: InitConfig = setting(InitConfig, "initial weights")

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "kv_heads", "ffn_width", "vocab_size", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.{name} is {value}: write a positive number")
        if self.width % self.heads:
            raise ConfigError(f"model.width {self.width} is not a multiple of model.heads {self.heads}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ConfigError(f"model.kv_heads {self.kv_heads} does not divide model.heads {self.heads}")
        if self.trunk == "llama" and self.head_width % 2:
            raise ConfigError(
                f"model.width {self.width} / model.heads {self.heads} is odd: RoPE turns pairs, choose an even one"
            )
        for name, value in (
            ("norm_eps", self.norm_eps),
            ("rope_theta", self.rope_theta),
            ("alpha.target", self.alpha.target),
            ("init.std", 1.0 if self.init.std == "fan_in" else self.init.std),
            ("init.embedding_std", 1.0 if self.init.embedding_std is None else self.init.embedding_std),
            ("init.head_std", 1.0 if self.init.head_std is None else self.init.head_std),
        ):
            if not value > 0:
                raise ConfigError(f"model.{name} is {value}: write a positive number")
        first = self.first_blocks
        if first is not None and (first < 0 or (isinstance(first, float) and first >= 1)):
            raise ConfigError(
                f"model.first_blocks is {first}: write a whole number of blocks, or a share of the depth below 1"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout is {self.dropout}: write a probability below 1")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def feedforward_width(self) -> int:
        if self.ffn_width is not None:
            return self.ffn_width
        return 4 * self.width if self.trunk == "gpt" else -(-8 * self.width // (3 * 64)) * 64

    @property
    def is_tied(self) -> bool:
        return self.trunk == "gpt" if self.tied is None else self.tied

    @property
    def vocabulary(self) -> int:
        """The resolved vocabulary size. The tokenizer sets it before a model is built."""
        assert self.vocab_size is not None, "vocab_size is resolved from the tokenizer before building"
        return self.vocab_size
