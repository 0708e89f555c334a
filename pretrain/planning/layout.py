"""What a rank holds beside the trace: its part of parameters, gradients and moments, and collectives' buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from pretrain.config import OptimizerConfig, RunConfig
from pretrain.optimizers import MSGDW, CompactAdamW, Lion, Muon, SGDSaI
from pretrain.optimizers.elementwise import Elementwise
from pretrain.optimizers.slices import CHUNK_ELEMENTS
from pretrain.planning.sizes import Sizes
from pretrain.planning.terms import Terms

FP32 = 4  # bytes
BF16 = 2


Phase = Literal[
    "embedding",
    "forward",
    "loss",
    "loss_backward",
    "backward",
    "reduce",  # a block's backward is over and all its gradients are there
    "embedding_backward",
    "reduce_root",  # so is the micro-batch's
    "step",
]


class Moment(NamedTuple):
    """Of the step's last micro-batch; ``block``, from 0, where the phase is one block's."""

    phase: Phase
    block: int = 0

    def __str__(self) -> str:
        name = self.phase.replace("_", " ")
        return f"{name} of block {self.block}" if self.phase in ("forward", "backward", "reduce") else name


class Collective(NamedTuple):
    """``size`` is that of the whole tensor in bytes, on ``ranks`` that are ``stride`` apart.

    ``when``: beside the forward or the backward of every micro-batch, beside the last one's backward, or after it.
    """

    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    when: Literal["forward", "backward", "last backward", "after"]
    size: float
    ranks: int
    stride: int = 1


class Layout(Protocol):
    """An engine's rules. ``gathers_bf16`` and ``keeps_gradients`` are what the trace asks for."""

    @property
    def sizes(self) -> Sizes: ...

    @property
    def gathers_bf16(self) -> bool: ...

    @property
    def keeps_gradients(self) -> bool: ...

    def held(self, moment: Moment) -> Terms:
        """Without what the trace has: activations, the loss, and gradients that the phase itself makes."""

    def host(self) -> float:
        """Bytes of the CPU's memory for one rank."""

    def collectives(self) -> Iterator[Collective]:
        """Of a step."""


def moments_bytes(config: RunConfig, sizes: Sizes) -> float:
    """Of an element's moments; of Muon, whose matrices have one and the rest perhaps two, on average."""
    optimizer = config.optimizer
    matrices = sizes.matmul - config.model.vocabulary * config.model.width
    share = matrices / sizes.parameters if optimizer.name == "muon" else 1.0
    count = share * _moments(optimizer.name) + (1.0 - share) * _moments(optimizer.muon.others)
    return count * (FP32 if optimizer.state_dtype == "fp32" else BF16)


def _moments(name: str) -> int:
    kinds: dict[str, type[Elementwise]] = {
        "msgdw": MSGDW,
        "adamw": CompactAdamW,
        "lion": Lion,
        "muon": Muon,
        "sgd-sai": SGDSaI,
    }
    return len(kinds[name].MOMENTS)


def stepping_bytes(optimizer: OptimizerConfig, elements: int) -> float:
    """What a step over ``elements`` allocates, in portions (optimizers/slices.py). bf16 moments: for each a copy in
    fp32, noise in 16 and in 32 bits, and the fp32 of rounding; Nesterov, Lion: the update; Muon, of a matrix: that and
    what the iteration makes of it in bf16."""
    portion = min(elements, CHUNK_ELEMENTS)
    size = 0
    if optimizer.state_dtype == "bf16":
        moments = _moments(optimizer.name)
        size = moments * (FP32 + BF16) + (2 * FP32 if optimizer.state_rounding == "stochastic" else 0)
    if optimizer.name in ("lion", "muon") or (optimizer.name == "msgdw" and optimizer.nesterov):
        size += FP32
    if optimizer.name == "muon":
        size += 3 * BF16
    return portion * size


@dataclass(frozen=True)
class OneProcess:
    """The plain model: everything whole, in fp32. Of several micro-batches the later ones find gradients."""

    config: RunConfig
    sizes: Sizes
    accumulation: int

    gathers_bf16 = False

    @property
    def keeps_gradients(self) -> bool:
        return self.accumulation == 1

    def held(self, moment: Moment) -> Terms:
        sizes, elements = self.sizes, self.sizes.parameters
        optimizer = self.config.optimizer
        done = elements if self.accumulation > 1 else whole_gradients(sizes, moment)
        return Terms(
            parameters=FP32 * elements,
            gradients=FP32 * done,
            optimizer=moments_bytes(self.config, sizes) * elements,
            step=stepping_bytes(optimizer, elements) if moment.phase == "step" else 0,
        )

    def host(self) -> float:
        return 0.0

    def collectives(self) -> Iterator[Collective]:
        return iter(())


def blocks_done(sizes: Sizes, moment: Moment) -> int:
    """Blocks whose backward is over."""
    match moment.phase:
        case "backward" | "reduce":
            return sizes.depth - 1 - moment.block
        case "embedding_backward" | "reduce_root" | "step":
            return sizes.depth
    return 0


def head_done(sizes: Sizes, moment: Moment) -> int:
    """Elements of the head whose gradient waits for that of the embedding, which is the root's last."""
    return sizes.head if moment.phase in ("backward", "reduce", "embedding_backward") else 0


def whole_gradients(sizes: Sizes, moment: Moment) -> int:
    """Elements whose gradient a first micro-batch has made before this moment's phase, or in it if it is a reduce."""
    if moment.phase in ("reduce_root", "step"):
        return sizes.parameters
    own = sizes.block.elements if moment.phase == "reduce" else 0
    return blocks_done(sizes, moment) * sizes.block.elements + head_done(sizes, moment) + own
