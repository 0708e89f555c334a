"""FSDP2 as pretrain/engines/fsdp.py uses it: which buffers are alive when (torch/distributed/fsdp/_fully_shard).

A block's parameters are gathered into one buffer, and from there copied into tensors. In the forward the buffer stays
until the next block is there, in the backward it goes at once; blocks gathered ahead are such buffers. Gradients to
reduce are copied into an fp32 buffer, which stays until the next block's are there. Embedding, positions and head are
one group in fp32, gathered from the start of the forward to the end of the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.planning.layout import (
    BF16,
    FP32,
    Collective,
    Moment,
    blocks_done,
    head_done,
    moments_bytes,
    stepping_bytes,
)
from pretrain.planning.sizes import Sizes
from pretrain.planning.terms import Terms


@dataclass(frozen=True)
class FSDP:
    """``group`` of the ``ranks`` share a copy of the model; ``sizes`` has a rank's share. A group of 1: replicated."""

    config: RunConfig
    sizes: Sizes
    ranks: int
    group: int
    accumulation: int

    keeps_gradients = True

    @property
    def gathers_bf16(self) -> bool:
        return self.config.precision.compute == "bf16"

    @property
    def reduces_once(self) -> bool:
        """A step, and not every micro-batch; whole gradients wait in between."""
        return self.config.parallel.shard in ("grad_op", "replicate")

    @property
    def gathers_once(self) -> bool:
        return self.config.parallel.shard == "grad_op"

    @property
    def block_bytes(self) -> float:
        """Of a block gathered from all ranks."""
        block = self.sizes.block
        size = BF16 if self.gathers_bf16 else FP32
        if self.config.precision.fp8 == "tensorwise" and self.group > 1:
            return block.linears + size * (block.share * self.group - block.linears)
        return size * block.share * self.group

    @property
    def offloads(self) -> bool:
        return self.config.parallel.cpu_offload

    def held(self, moment: Moment) -> Terms:
        sizes, optimizer = self.sizes, self.config.optimizer
        here = sizes.replicated + (0 if self.offloads else sizes.share)
        return Terms(
            parameters=FP32 * here,
            gathered=self._gathered(moment),
            gradients=self._gradients(moment) + FP32 * sizes.replicated,
            optimizer=moments_bytes(self.config, sizes) * here,
            communication=self._buffers(moment),
            step=stepping_bytes(optimizer, here) if moment.phase == "step" else 0,
        )

    def host(self) -> float:
        if not self.offloads:
            return 0.0
        return self.sizes.share * (2 * FP32 + moments_bytes(self.config, self.sizes))

    def collectives(self) -> Iterator[Collective]:
        sizes, group = self.sizes, self.group
        blocks, root = sizes.depth * self.block_bytes, FP32 * sizes.root.share * group
        share = FP32 * sizes.share
        yield Collective("all-gather", "forward", blocks + root, group)
        if not self.gathers_once:
            yield Collective("all-gather", "backward", blocks, group)
        yield Collective("reduce-scatter", "last backward" if self.reduces_once else "backward", share * group, group)
        yield Collective("all-reduce", "last backward", share, self.ranks // group, stride=group)
        yield Collective("all-reduce", "after", FP32 * sizes.replicated, self.ranks)

    def _gathered(self, moment: Moment) -> float:
        phase, j = moment
        if phase in ("reduce_root", "step"):
            return 0
        blocks = 1 if phase in ("forward", "backward") else 0
        if self.gathers_once:  # each block from its forward to its backward
            blocks = {"embedding": 0, "forward": j + 1, "backward": j + 1, "reduce": j, "embedding_backward": 0}.get(
                phase, self.sizes.depth
            )
        return blocks * self.block_bytes + FP32 * self.sizes.root.share * self.group

    def _buffers(self, moment: Moment) -> float:
        phase, j = moment
        last, ahead = self.sizes.depth - 1, self.config.parallel.prefetch
        gathers = 0
        if self.group > 1:
            match phase:
                case "forward":
                    gathers = 1 + min(ahead, last - j)
                case "loss" | "loss_backward":
                    gathers = 1
                case "backward" | "reduce":
                    gathers = 0 if self.gathers_once else min(ahead, j)
        first = FP32 * self.sizes.root.share * self.group if phase == "embedding" and self.group > 1 else 0
        return first + gathers * self.block_bytes + self._reduced(moment)

    def _reduced(self, moment: Moment) -> float:
        match moment.phase:
            case "backward" if moment.block == self.sizes.depth - 1:
                return 0
            case "backward" | "reduce" | "embedding_backward":
                return FP32 * self.sizes.block.share * self.group
            case "reduce_root":
                return FP32 * self.sizes.root.share * self.group
        return 0

    def _gradients(self, moment: Moment) -> float:
        """Those of a block are in the compute type until they are reduced or accumulated."""
        sizes, phase = self.sizes, moment.phase
        block, root = sizes.block, sizes.root
        done = blocks_done(sizes, moment)
        own = (BF16 if self.gathers_bf16 else FP32) * block.whole if phase == "reduce" else 0
        waiting = FP32 * (root.whole if phase == "reduce_root" else head_done(sizes, moment))
        if self.accumulation > 1 and self.reduces_once and phase != "step":
            # Whole, of all earlier micro-batches; the last one's backward exchanges them for shares block by block.
            left = sizes.depth - done
            return FP32 * (left * block.whole + root.whole + (0 if self.offloads else done * block.share)) + own
        shares = sizes.share if self.accumulation > 1 or phase == "step" else done * block.share
        return (0 if self.offloads else FP32 * shares) + own + waiting
