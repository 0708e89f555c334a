"""Do both sides of a conversion say the same of real text?"""

from __future__ import annotations

import gc
import importlib.util
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import ConfigError, Transformer
from tools.formats import huggingface, source
from tools.formats.folding import fold
from tools.formats.lazy import LazyTensor
from tools.formats.text import persuasion
from tools.formats.weights import Weights, on_meta

_TOKENS = 256
# Of the largest logit, for sums of fp32 in two orders: 2^-24 a rounding, grown along some dozens of layers. Folding a
# gain is of this kind: the product with the weight is rounded, where the one with the activation was.
TOLERANCE = 1e-5


def transformer(config: Any, tensors: Mapping[str, LazyTensor]) -> Transformer:
    """Our model with these weights, in fp32 and evaluation mode."""
    model = on_meta(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name].read())
    return model.eval()


@torch.no_grad()
def compare(
    weights: Weights, tensors: Mapping[str, LazyTensor], destination: Path, unfolded: Weights | None = None
) -> str:
    """Reloads the source with ``tensors``, its weights in the dtype that was written, and then the destination, and
    compares their logits. One side at a time is in memory, in fp32. Returns a line; ConfigError if they differ.

    A folder that transformers loads by classes of its own is loaded by transformers, where that is installed.
    ``unfolded``: the source, if ``weights`` are it with gains folded; then that is what is compared with. Where the
    products were rounded, so that it would differ by more, the products in fp32 stand in for the destination.
    """
    tokens, what = _text(weights)
    exact = weights if unfolded is None else fold(unfolded, torch.float32)[0]
    original = weights if unfolded is None else unfolded
    is_rounded = any(tensor.dtype.itemsize < exact.model[name].dtype.itemsize for name, tensor in tensors.items())
    if is_rounded:
        expected = _logits(weights.config.model, tensors, tokens)
    else:
        expected = _logits(original.config.model, original.model, tokens)
    model, by = _reload(weights, destination)
    found = model(tokens)
    found = found if isinstance(found, Tensor) else found.logits
    del model
    against = ", against the unfolded source" if unfolded is not None and not is_rounded else ""
    line = _agreement(found, expected, f"logits of {what}, reloaded by {by}{against}", destination)
    if is_rounded:
        source_logits = _logits(original.config.model, original.model, tokens)
        if unfolded is not None:
            products = _logits(exact.config.model, exact.model, tokens)
            line += "; " + _agreement(products, source_logits, "folded in fp32, against the source", destination)
        rounding = (source_logits - expected).abs().max().item()
        line += f"; rounding the weights moved them by up to {rounding:.2e}"
    return line


def _logits(config: Any, tensors: Mapping[str, LazyTensor], tokens: Tensor) -> Tensor:
    """Of our model with these weights, of which nothing is in memory afterwards."""
    logits: Tensor = transformer(config, tensors)(tokens)
    gc.collect()
    return logits


def _agreement(found: Tensor, expected: Tensor, what: str, destination: Path) -> str:
    difference = (found - expected).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    line = f"{what}: maximal absolute difference {difference:.2e}, allowed {allowed:.2e}"
    if not difference <= allowed:
        raise ConfigError(f"{line}: the conversion is wrong, do not use {destination}")
    return line


def _reload(weights: Weights, destination: Path) -> tuple[nn.Module, str]:
    stock = (destination / "config.json").is_file() and huggingface.stock_architecture(weights.config.model)[0]
    if stock and importlib.util.find_spec("transformers"):
        for noisy in ("torchao", "torch.utils._pytree"):  # transformers loads the first
            logging.getLogger(noisy).setLevel(logging.ERROR)
        import transformers

        transformers.utils.logging.disable_progress_bar()
        loaded: nn.Module = getattr(transformers, stock).from_pretrained(
            destination, dtype=torch.float32, attn_implementation="eager"
        )
        return loaded.eval(), f"transformers' {stock}"
    # What we have just written is no stranger's pickle.
    _, read = source.read(destination, allow_pickle=True, with_optimizer=False)
    return transformer(read.config.model, read.model), "our own reader"


def _text(weights: Weights) -> tuple[Tensor, str]:
    config = weights.config.model
    count = min(config.context, _TOKENS)
    if ids := persuasion(weights, count):
        return torch.tensor([ids]), f"{len(ids)} tokens of Persuasion"
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(config.vocabulary, (1, count), generator=generator)
    return drawn, f"{math.prod(drawn.shape)} random tokens, there being no tokenizer"
