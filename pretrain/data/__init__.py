"""Text to tokens to batches: preparation, the sampled token stream, and the loader."""

from __future__ import annotations

from models.errors import ConfigError
from pretrain.config import DataConfig
from pretrain.data.loader import Loader, RankBatch, batch_hash
from pretrain.data.prepared import PreparedSource
from pretrain.data.source import EvaluationSet, TokenSource
from pretrain.data.tokenizer import Tokenizer

__all__ = [
    "EvaluationSet",
    "Loader",
    "RankBatch",
    "TokenSource",
    "Tokenizer",
    "batch_hash",
    "open_source",
]


def open_source(config: DataConfig, seed: int, rank: int = 0, world_size: int = 1) -> TokenSource:
    """The source that the configuration names, checked. ConfigError says what is missing and what makes it.

    Every rank checks that the files are there and have their size; the ranks share the checking of what is in them.
    """
    if config.sequence_length < 1:
        raise ConfigError(f"data.sequence_length is {config.sequence_length}: write a positive number")
    if config.prefetch < 1:
        raise ConfigError(f"data.prefetch is {config.prefetch}: write a positive number")
    if config.source == "stream":
        from pretrain.data.streaming import StreamingSource  # `datasets` takes a second to import

        return StreamingSource(config.stream, config.sequence_length)
    return PreparedSource(
        config.path, config.sequence_length, seed, verify=config.verify, rank=rank, world_size=world_size
    )
