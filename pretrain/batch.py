"""From rows of tokens to what the model takes: inputs, targets, and the documents that confine attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from models.loss import IGNORE


class Batch(NamedTuple):
    """``inputs``, ``targets`` (``IGNORE`` for none) and ``documents`` (or None), int64 [sequences, length]."""

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None


def make_batch(rows: Tensor, eos: int, document_mask: bool) -> Batch:
    """Split ``rows`` int64 [sequences, length + 1]. EOS ends its document.

    With ``document_mask`` a document's first token is no target: nothing before it could tell it.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    if not document_mask:
        return Batch(inputs, targets, None)
    return Batch(inputs, targets.masked_fill(inputs.eq(eos), IGNORE), document_numbers(inputs, eos))


def document_numbers(inputs: Tensor, eos: int) -> Tensor:
    """The running number of each token's document, int64 [sequences, length]; EOS belongs to the one that it ends."""
    ends = inputs.eq(eos)
    return ends.cumsum(dim=1) - ends.long()
