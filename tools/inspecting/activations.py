"""Outliers among activations, and the entropy of attention, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn

from models.attention import Attention, document_mask
from pretrain.telemetry.attention import query_positions, record_attention, visible_keys
from pretrain.telemetry.sites import hooked
from pretrain.telemetry.statistics import Outliers, outliers
from tools.inspecting.subject import Subject, chunks, forward

# What is looked at: the stream, before the first block and after each, and what the blocks' linears read.
PLACES = {
    "stream": "residual stream",
    "q": "input of q, k, v",
    "out": "input of out",
    "up": "input of gate, up",
    "down": "input of down",
}


class Layer(NamedTuple):
    """Outliers at one place; the stream's ``depth`` counts the blocks behind it, the others' is their block."""

    place: str
    depth: int
    features: int
    over: float  # see pretrain.telemetry.statistics.Outliers
    kurtosis: float
    ratio: float


def look_at_outliers(subject: Subject, progress: Progress) -> tuple[int, list[Layer]]:
    """(tokens looked at, layers), in one pass over the first of the held-out text: as much as goes through at once."""
    found: dict[tuple[str, int], tuple[int, Outliers]] = {}
    handles = []

    def watch(module: nn.Module, place: str, depth: int) -> None:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            found[place, depth] = (inputs[0].shape[-1], outliers(inputs[0]))

        handles.append(module.register_forward_pre_hook(hook))

    def watch_end(module: nn.Module, depth: int) -> None:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            found["stream", depth] = (output.shape[-1], outliers(output))

        handles.append(module.register_forward_hook(hook))

    for index, block in enumerate(subject.model.blocks):
        if index == 0:
            watch(block, "stream", 0)
        watch_end(block, index + 1)
        for name, module in block.named_modules():
            if name.split(".")[-1] in PLACES:
                watch(module, name.split(".")[-1], index)
    part = next(chunks(subject.held_out))
    with hooked(handles):
        for _ in progress.track(range(1), description="outliers"):
            forward(subject, part)
    layers = [
        Layer(place, depth, features, *(value.item() for value in of))
        for (place, depth), (features, of) in sorted(found.items(), key=lambda item: list(PLACES).index(item[0][0]))
    ]
    return part.inputs.numel(), layers


class Entropies(NamedTuple):
    """``share`` fp32 [blocks, heads]: the mean entropy of a head's distributions over keys, as a share of the largest
    that what each query sees allows, log(visible keys); queries that see one key alone are left out. ``nats``
    [blocks, heads]: the mean itself."""

    share: Tensor
    nats: Tensor


def look_at_attention(subject: Subject, progress: Progress) -> Entropies:
    """Over the held-out text, at the query positions that pretrain.telemetry.attention chooses."""
    shares: dict[str, list[Tensor]] = defaultdict(list)
    nats: dict[str, list[Tensor]] = defaultdict(list)
    for part in progress.track(list(chunks(subject.held_out)), description="attention"):
        batch, length = part.inputs.shape
        with record_attention(subject.model) as found:
            forward(subject, part)
        positions = query_positions(length, device=part.inputs.device)
        visible = visible_keys(document_mask(part.documents), positions, batch, length)
        most = visible.sum(-1).double().log().expand(batch, 1, len(positions))
        for name, entropy in found.items():
            share = (entropy / most).masked_fill(most == 0, torch.nan)
            shares[name].append(share.movedim(1, -1).flatten(0, -2).cpu())
            nats[name].append(entropy.movedim(1, -1).flatten(0, -2).cpu())
    names = [name for name, module in subject.model.named_modules() if isinstance(module, Attention)]
    blocks = [name.rpartition(".")[0] for name in names]
    return Entropies(*(torch.stack([torch.cat(of[name]).nanmean(0) for name in blocks]) for of in (shares, nats)))
