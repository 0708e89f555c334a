"""DeepSpeed's ZeRO as pretrain/engines/deepspeed.py configures it (deepspeed/runtime/zero, 0.19.8).

Parameters, gradients and moments are fp32, and bf16 is autocast's: matrices are copied where they are used, in every
stage. From stage 1 on a rank steps on an fp32 copy of its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.config import RunConfig
from pretrain.counts import Counts
from pretrain.engines.deepspeed import deepspeed_config
from pretrain.planning.layout import FP32, Collective, Moment, moments_bytes, stepping_bytes, whole_gradients
from pretrain.planning.sizes import Sizes
from pretrain.planning.terms import Terms


@dataclass(frozen=True)
class Zero:
    """``sizes`` are undivided: ZeRO flattens, and gives each of ``counts.world_size`` ranks an equal part of all."""

    config: RunConfig
    sizes: Sizes
    counts: Counts

    gathers_bf16 = False

    @property
    def stage(self) -> int:
        return self.config.parallel.zero_stage

    @property
    def keeps_gradients(self) -> bool:
        """Stage 1 and 0 accumulate in the parameters' own gradients, the others reduce each at once."""
        return self.stage < 2 and self.counts.accumulation == 1

    @property
    def share(self) -> float:
        return self.sizes.parameters / (self.counts.world_size if self.stage > 0 else 1)

    @property
    def bucket(self) -> float:
        """Bytes that one collective carries."""
        return FP32 * float(deepspeed_config(self.config, self.counts)["zero_optimization"]["reduce_bucket_size"])

    def held(self, moment: Moment) -> Terms:
        elements, optimizer = self.sizes.parameters, self.config.optimizer
        moments = moments_bytes(self.config, self.sizes) * self.share + (FP32 * self.share if self.stage > 0 else 0)
        stepping = 0.0
        if moment.phase == "step":  # ZeRO flattens the gradients of a group, the matrices at most, to step on them
            stepping = stepping_bytes(optimizer, round(self.share)) + (FP32 * self.share if self.stage > 0 else 0)
        return Terms(
            parameters=FP32 * (elements if self.stage < 3 else self.share),
            gathered=self._gathered(moment),
            gradients=FP32 * self._gradients(moment),
            optimizer=0 if self.config.parallel.cpu_offload else moments,
            communication=self._buffers(moment),
            step=0 if self.config.parallel.cpu_offload else stepping,
        )

    def host(self) -> float:
        """Offloaded: moments, the copy of the share, and its gradient."""
        if not self.config.parallel.cpu_offload:
            return 0.0
        return (moments_bytes(self.config, self.sizes) + 2 * FP32) * self.share

    def collectives(self) -> Iterator[Collective]:
        """A bucket goes from each rank to the one that owns its part, which sends as much as a reduce-scatter."""
        whole, ranks = FP32 * float(self.sizes.parameters), self.counts.world_size
        match self.stage:
            case 0:
                yield Collective("all-reduce", "after", whole, ranks)
            case 1 | 2:
                when: Literal["backward", "last backward"] = "backward" if self.stage == 2 else "last backward"
                yield Collective("reduce-scatter", when, whole, ranks)
                yield Collective("all-gather", "after", whole, ranks)
            case 3:
                yield Collective("all-gather", "forward", whole, ranks)
                yield Collective("all-gather", "backward", whole, ranks)
                yield Collective("reduce-scatter", "backward", whole, ranks)

    def _gathered(self, moment: Moment) -> float:
        """Stage 3 keeps what will soon be used again, up to a limit."""
        if self.stage < 3 or moment.phase == "step":
            return 0
        zero = deepspeed_config(self.config, self.counts)["zero_optimization"]
        return FP32 * min(self.sizes.parameters, float(zero["stage3_max_live_parameters"]))

    def _gradients(self, moment: Moment) -> float:
        if self.stage >= 2:
            made = moment.phase in ("backward", "reduce", "embedding_backward", "reduce_root", "step")
            wanted = made or self.stage == 3 or self.counts.accumulation > 1  # stage 3 keeps its buffer for good
            return self.share if wanted and not self.config.parallel.cpu_offload else 0.0
        return self.sizes.parameters if self.counts.accumulation > 1 else whole_gradients(self.sizes, moment)

    def _buffers(self, moment: Moment) -> float:
        """Two buckets of gradients, one filled while the other is reduced; stage 3 has one, and one of parameters."""
        if moment.phase not in ("backward", "reduce", "embedding_backward", "reduce_root"):
            return 0
        if self.stage == 0:
            return min(self.bucket, FP32 * self.sizes.parameters) if moment.phase == "reduce_root" else 0
        return 2 * self.bucket
