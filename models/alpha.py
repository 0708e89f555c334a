"""Where alpha starts: by rule, at each site (initialization.py measures it where the rule is measured)."""

from __future__ import annotations

import math

from models.config import AlphaConfig

# Sites of the attention branch, at which the rules have one value; all others have another.
ATTENTION_SITES = ("attn_in", "query", "key", "value", "attn_mid", "attn_out", "attn_post")

# arXiv 2503.10622v2, table 11: width -> alpha at (attention sites, other sites); depth made no difference.
PAPER_ALPHA = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 8192: (0.2, 0.05)}


def alpha_by_width(width: int) -> tuple[float, float]:
    """The paper's table, log-log interpolated between its rows and constant beyond its ends (the table says nothing
    there; below width 1024 the rule is known to fail, see docs/results.md). Returns (attention, other)."""
    widths = sorted(PAPER_ALPHA)
    width = min(max(width, widths[0]), widths[-1])
    low = max(w for w in widths if w <= width)
    high = min(w for w in widths if w >= width)
    if low == high:
        return PAPER_ALPHA[low]
    t = math.log(width / low) / math.log(high / low)
    attention, other = (a ** (1 - t) * b**t for a, b in zip(PAPER_ALPHA[low], PAPER_ALPHA[high], strict=True))
    return attention, other


def initial_alpha(site: str, width: int, config: AlphaConfig) -> float:
    """alpha at ``site`` before the first step. For rule measured, the value before the measurement: 1."""
    attention = site in ATTENTION_SITES
    if config.rule == "constant":
        return config.constant
    if config.rule == "role":
        return config.attention if attention else config.other
    if config.rule == "width":
        return alpha_by_width(width)[0 if attention else 1]
    return 1.0
