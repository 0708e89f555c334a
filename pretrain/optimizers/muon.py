"""Muon: matrices move by their orthogonalized momentum; everything else by AdamW or mSGDW."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.optim.optimizer import ParamsT

from models.initialization import chunk_of
from pretrain.optimizers.adamw import CompactAdamW
from pretrain.optimizers.elementwise import Elementwise
from pretrain.optimizers.msgdw import MSGDW, check_range
from pretrain.optimizers.slices import Slice
from pretrain.optimizers.storage import Rounding

AdjustLR = Literal["original", "match_rms_adamw"]

# Jordan's, which are the defaults of torch.optim.Muon as far as setup.py admits torch; later ones have others.
_COEFFICIENTS, _ITERATIONS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7


class Muon(Elementwise):
    """Muon, of Jordan et al., https://kellerjordan.github.io/posts/muon/, as ``torch.optim.Muon`` has it.

    A group whose key ``rule`` is muon holds matrices. With gradient G, scheduled learning rate lr, momentum μ and
    weight decay λ, one step of a matrix P of A rows and B columns is::

        M ← μ·M + (1 - μ)·G                                   from M = 0
        O ← NS₅(μ·M + (1 - μ)·G)                              Nesterov's variant; singular values near 1, in bf16
        P ← (1 - lr·λ) · P
        P ← P - lr · a · O       a = √max(1, A/B) (original) or 0.2 √max(A, B) (match_rms_adamw, arXiv 2502.16982)

    The arithmetic and the five Newton-Schulz iterations are torch's own. Elements of O have a root mean square of about
    1/√max(A, B), so that with match_rms_adamw a step has 0.2 lr, as AdamW's have. Groups of rule adamw or msgdw hold
    everything else, under those optimizers' state names and settings.

    An iteration needs the whole matrix. torch.optim.Muon on DTensors gathers within every product: 15 all-gathers a
    matrix. Here, of as many matrices as ranks share, each rank gets one whole, in bf16, iterates and gives the rows
    back: two all-to-alls for them together. So each rank iterates for its share of the matrices and sends 4 bytes an
    element of its shard a step, and the result is that of one process, bit for bit. Ranks that replicate a shard
    repeat the work. A matrix takes 5·(4·A²·B + 2·A³) operations for A ≤ B: at most those of a forward and backward of
    5·A tokens.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
        state_rounding: Rounding = "stochastic",
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, state_dtype, state_rounding)

    @staticmethod
    def settings(momentum: float, adjust_lr: AdjustLR) -> dict[str, Any]:
        """What a group of rule muon has beside the learning rate and the decay."""
        check_range("optimizer.muon.momentum", momentum, below=1.0)
        return {"rule": "muon", "momentum": momentum, "adjust_lr": adjust_lr}

    def _rule(self, group: dict[str, Any]) -> type[Elementwise]:
        rules: dict[str, type[Elementwise]] = {"muon": Muon, "adamw": CompactAdamW, "msgdw": MSGDW}
        return rules[group["rule"]]

    def _step_group(self, group: dict[str, Any]) -> None:
        if group["rule"] != "muon":
            super()._step_group(group)
            return
        lr, momentum, noise = group["lr"], group["momentum"], group.get("noise", 0)
        for slices, shapes, shards in self._batches(group["params"]):
            before = self._before(slices)
            moments = self.storage.widen(slices)
            updates = []
            for one, moment in zip(slices, moments[0], strict=True):
                moment.lerp_(one.gradient, 1.0 - momentum)
                updates.append(one.gradient.lerp(moment, momentum).bfloat16())
            self.storage.keep(slices, moments, noise)
            for one, shape, update in zip(slices, shapes, orthogonalized(updates, shapes, shards), strict=True):
                one.parameter.mul_(1.0 - lr * group["weight_decay"])
                one.parameter.add_(update, alpha=-lr * lr_adjustment(shape, group["adjust_lr"]))
            self._leave_out(before)

    def _batches(self, parameters: list[Tensor]) -> Iterator[tuple[list[Slice], list[torch.Size], Shards | None]]:
        """As many matrices at a time as ranks share them: this rank's slices, the whole shapes, the ranks."""
        held = [(number, p) for number, p in enumerate(parameters) if p.grad is not None]
        if not held:
            return
        shards = shards_of(held[0][1])
        size = 1 if shards is None else shards.size
        for first in range(0, len(held), size):
            batch = held[first : first + size]
            assert all(p.dim() == 2 and shards_of(p) == shards for _, p in batch)
            slices = [self._slice(p, number, Muon)[0] for number, p in batch]
            yield slices, [p.shape for _, p in batch], shards

    @staticmethod
    def update(slices: list[Slice], moments: list[list[Tensor]], group: dict[str, Any], first: bool) -> None:
        raise AssertionError("matrices do not move by their slices")


def lr_adjustment(shape: torch.Size, how: AdjustLR) -> float:
    """The factor on a matrix's learning rate."""
    rows, columns = shape
    return 0.2 * sqrt(max(rows, columns)) if how == "match_rms_adamw" else sqrt(max(1.0, rows / columns))


class Shards(NamedTuple):
    """The ranks that share matrices by rows, and this one among them."""

    group: dist.ProcessGroup
    rank: int
    size: int
    device: torch.device  # on which they exchange


def shards_of(parameter: Tensor) -> Shards | None:
    """None where every rank has all of it."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    dims = [d for d, p in enumerate(parameter.placements) if not p.is_replicate() and mesh.size(d) > 1]
    if not dims:
        return None
    (dim,) = dims
    assert parameter.placements[dim] == Shard(0)
    return Shards(mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim), torch.device(mesh.device_type))


def orthogonalized(updates: list[Tensor], shapes: list[torch.Size], shards: Shards | None) -> list[Tensor]:
    """NS₅ of the matrices whose rows on this rank are ``updates`` (bf16, overwritten); again those rows. Collective.

    ``shapes`` are those of the whole matrices, of which there are at most as many as ranks.
    """
    if shards is None:
        return [_newton_schulz(update) for update in updates]
    device = updates[0].device
    sent = torch.cat([update.flatten() for update in updates]).to(shards.device)
    theirs = [update.numel() for update in updates] + [0] * (shards.size - len(updates))  # the i-th is for rank i
    mine = [0] * shards.size
    if shards.rank < len(updates):
        rows, columns = shapes[shards.rank]
        mine = [len(chunk_of(range(rows), rank, shards.size)) * columns for rank in range(shards.size)]
    whole = sent.new_empty(sum(mine))
    dist.all_to_all_single(whole, sent, mine, theirs, group=shards.group)
    if shards.rank < len(updates):
        whole = _newton_schulz(whole.view(shapes[shards.rank])).flatten()
    dist.all_to_all_single(sent, whole, theirs, mine, group=shards.group)
    parts = sent.to(device).split(theirs[: len(updates)])
    return [part.view_as(update) for part, update in zip(parts, updates, strict=True)]


def _newton_schulz(matrix: Tensor) -> Tensor:
    return _zeropower_via_newtonschulz(matrix, _COEFFICIENTS, _ITERATIONS, _EPS)
