"""How spread out attention is: the entropy of its distributions over keys. Its collapse precedes instability
(arXiv 2303.06296)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.attention import Attention
from models.rotary import rotate
from pretrain.telemetry.sites import hooked

QUERIES = 128  # positions of a sequence that are looked at: scores cost that many rows of the whole square


def query_positions(length: int, count: int = QUERIES, device: torch.device | None = None) -> Tensor:
    """The middles of ``count`` equal parts of a sequence, int64; all positions of a shorter one."""
    count = min(count, length)
    return (2 * torch.arange(count, device=device) + 1) * length // (2 * count)


def visible_keys(mask: Any, positions: Tensor, batch: int, length: int) -> Tensor:
    """What queries at ``positions`` see under a mask of models.attention.document_mask, or causally under None: bool,
    broadcastable to [batch, heads, positions, length]."""
    keys = torch.arange(length, device=positions.device)
    if mask is None:
        return positions[:, None] >= keys
    if isinstance(mask, Tensor):
        return mask[:, :, positions]
    rows = torch.arange(batch, device=positions.device)[:, None, None, None]  # FlexAttention's block mask
    return mask.mask_mod(rows, torch.zeros_like(rows), positions[:, None], keys)


@torch.no_grad()
def attention_entropies(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Of softmax(q k^T / sqrt(head width)) over the ``visible`` keys, in nats, fp32 [batch, heads, positions].

    q is [batch, heads, positions, head width] and k [batch, kv heads, length, head width], both after norm and RoPE.
    Attention that looks at all of n keys alike has log n, at one key alone 0.
    """
    with torch.autocast(q.device.type, enabled=False):
        k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q.float() @ k.mT / sqrt(q.shape[-1])
    return torch.special.entr(scores.masked_fill(~visible, -torch.inf).softmax(-1)).sum(-1)


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the entropies of every attention during the forward pass inside the ``with``.

    Yields a dict, name of the block -> ``attention_entropies`` at ``query_positions``, that the pass fills. q and k are
    taken from the modules that the forward calls anyway, so that nothing is computed twice but the scores, and sharded
    parameters are gathered as in every forward.
    """
    found: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            held: dict[str, Tensor] = {}
            handles.append(_last(module.q, module.query).register_forward_hook(_holder("q", held)))
            handles.append(_last(module.k, module.key).register_forward_hook(_holder("k", held)))
            handles.append(module.register_forward_hook(_recorder(name.rpartition(".")[0], held, found)))
    with hooked(handles):
        yield found


def _last(linear: nn.Module, norm: nn.Module | None) -> nn.Module:
    return linear if norm is None else norm


def _holder(key: str, held: dict[str, Tensor]) -> Any:
    def hold(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        held[key] = output

    return hold


def _recorder(name: str, held: dict[str, Tensor], found: dict[str, Tensor]) -> Any:
    def record(module: Attention, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, rotary, mask = inputs[:3]
        batch, length = x.shape[:2]
        positions = query_positions(length, device=x.device)
        q, k = (held.pop(key).reshape(batch, length, -1, module.head_width).transpose(1, 2) for key in ("q", "k"))
        q = q[:, :, positions]
        if rotary is not None:
            cosine, sine = rotary
            q, k = rotate(q, (cosine[positions], sine[positions])), rotate(k, rotary)
        found[name] = attention_entropies(q, k, visible_keys(mask, positions, batch, length))

    return record
