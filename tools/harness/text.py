"""The loss of a model on a text, in windows that score every token once.

Windows of one length begin every ``stride`` tokens, and a token is scored in the first window that reaches it, so that
each has at least length - stride tokens before it, save at the start of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from models.errors import ConfigError
from models.loss import IGNORE
from pretrain.data.source import TokenArray


class HeldOut(NamedTuple):
    """A stream of tokens whose first is not a target, and the bytes of UTF-8 text behind the targets."""

    name: str
    tokens: TokenArray
    bytes: int


class Score(NamedTuple):
    loss: float  # nats a target
    perplexity: float  # of a target
    bits_per_byte: float
    targets: int


@dataclass(frozen=True)
class Scored:
    """A model with all that is needed to score texts by it.

    ``nats(inputs, targets)``, both int64 [batch, length], is the negative log-likelihood summed over the targets.
    ``begin`` is the token before the first of a text, ``eos`` the one after the last of a document. ``length`` is the
    usual number of tokens in a window, ``context`` the most, ``at_once`` how many go through the model together.
    ``settings`` is what to say of it beside a result.
    """

    nats: Callable[[Tensor, Tensor], Tensor]
    encode: Callable[[str], Sequence[int]]
    begin: int
    eos: int
    device: torch.device
    length: int
    context: int
    at_once: int
    settings: dict[str, Any] = field(default_factory=dict)


def read_texts(paths: Sequence[Path], model: Scored) -> HeldOut:
    """Each file is a document. A token goes before the first, so that all tokens of the text are targets."""
    tokens, size = [model.begin], 0
    for path in paths:
        try:
            content = path.read_bytes()
            text = content.decode("utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not UTF-8: give plain text") from None
        if not text:
            raise ConfigError(f"{path} is empty: give some text")
        tokens += [*model.encode(text), model.eos]
        size += len(content)
    return HeldOut(", ".join(map(str, paths)), TokenArray([np.array(tokens)]), size)


def windows(tokens: TokenArray, length: int, stride: int, eos: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets), int64 [length], that score every token but the first exactly once.

    The first window scores all that it sees, the others their last ``stride``; what is seen only as context, and the
    filling (of ``eos``) after the end of the text, has the target ``IGNORE``.
    """
    assert 1 <= stride <= length
    scored = 0  # tokens 1 .. scored have been targets
    for start in range(0, len(tokens), stride):
        inputs = np.full(length, eos, np.int64)
        targets = np.full(length, IGNORE, np.int64)
        count = min(length, len(tokens) - 1 - start)
        text = tokens.read(start, count + 1)
        inputs[:count] = text[:-1]
        targets[scored - start : count] = text[scored - start + 1 :]
        yield inputs, targets
        scored = start + count
        if scored == len(tokens) - 1:
            return


@torch.no_grad()
def score(model: Scored, text: HeldOut, *, length: int, stride: int) -> Score:
    """The mean loss over ``text``."""
    batch = max(1, model.at_once // length)
    nats = torch.zeros((), dtype=torch.float64, device=model.device)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    count = 1 + -(-max(0, len(text.tokens) - 1 - length) // stride)
    console = Console(stderr=True)
    every = windows(text.tokens, length, stride, model.eos)
    for i, row in enumerate(track(every, text.name, count, console=console, transient=True), 1):
        rows.append(row)
        if len(rows) == batch or i == count:
            nats += model.nats(*(torch.from_numpy(np.stack(part)).to(model.device) for part in zip(*rows, strict=True)))
            rows.clear()
    targets, total = len(text.tokens) - 1, nats.item()
    loss = total / targets
    perplexity = math.exp(loss) if loss < 700 else math.inf  # beyond, it is more than a float holds
    return Score(loss, perplexity, total / math.log(2) / text.bytes, targets)
