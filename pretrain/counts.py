"""The one source of how much: sequences, micro-batches, accumulation and steps follow from the batch in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import ConfigError
from pretrain.config import RunConfig


@dataclass(frozen=True)
class Counts:
    """``sequences`` a global batch = ``world_size`` x ``accumulation`` x ``micro_batch``."""

    world_size: int
    sequence_length: int
    sequences: int
    micro_batch: int
    accumulation: int
    steps: int

    @property
    def batch_tokens(self) -> int:
        return self.sequences * self.sequence_length


def derive_counts(config: RunConfig, world_size: int) -> Counts:
    """Raises ConfigError where the numbers do not divide, with the nearest that do."""
    train, length = config.train, config.data.sequence_length
    for name, value in (("steps", train.steps), ("tokens", train.tokens), ("micro_batch", train.micro_batch)):
        if value is not None and value < 1:
            raise ConfigError(f"train.{name} is {value}: write a positive number")
    unit = length * world_size
    if train.batch_tokens < unit or train.batch_tokens % unit:
        near = max(unit, round(train.batch_tokens / unit) * unit)
        raise ConfigError(
            f"train.batch_tokens {train.batch_tokens} is not a multiple of data.sequence_length {length} x world size "
            f"{world_size}: write {near}"
        )
    share = train.batch_tokens // unit
    micro_batch = share if train.micro_batch is None else train.micro_batch
    if share % micro_batch:
        near = max(d for d in range(1, micro_batch + 1) if share % d == 0)
        raise ConfigError(f"train.micro_batch {micro_batch} does not divide a rank's {share} sequences: write {near}")
    if train.steps is not None:
        steps = train.steps
    else:
        assert train.tokens is not None, "RunConfig asks for steps or tokens"
        steps = -(-train.tokens // train.batch_tokens)
    return Counts(world_size, length, share * world_size, micro_batch, share // micro_batch, steps)
