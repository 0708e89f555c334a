"""Do both sides of a conversion say the same of real text?"""

from __future__ import annotations

import gc
import importlib.util
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

from models import ConfigError, Transformer
from pretrain.data import austen
from tools.formats import huggingface, source
from tools.formats.lazy import LazyTensor
from tools.formats.tokenizer import FAST, SENTENCEPIECE, loaded
from tools.formats.weights import Weights, on_meta

_TOKENS = 256
# Of the largest logit, for sums of fp32 in two orders: 2^-24 a rounding, grown along some dozens of layers.
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
def compare(weights: Weights, tensors: Mapping[str, LazyTensor], destination: Path) -> str:
    """Reloads the source with ``tensors``, its weights in the dtype that was written, and then the destination, and
    compares their logits. One side at a time is in memory, in fp32. Returns a line; ConfigError if they differ.

    A folder that transformers loads by classes of its own is loaded by transformers, where that is installed.
    """
    tokens, what = _text(weights)
    expected: Tensor = transformer(weights.config.model, tensors)(tokens)
    gc.collect()
    model, by = _reload(weights, destination)
    found = model(tokens)
    found = found if isinstance(found, Tensor) else found.logits
    difference = (found - expected).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    line = f"logits of {what}, reloaded by {by}: maximal absolute difference {difference:.2e}, allowed {allowed:.2e}"
    if not difference <= allowed:
        raise ConfigError(f"{line}: the conversion is wrong, do not use {destination}")
    if any(tensor.dtype.itemsize < weights.model[name].dtype.itemsize for name, tensor in tensors.items()):
        exact: Tensor = transformer(weights.config.model, weights.model)(tokens)
        rounding = (exact - expected).abs().max().item()
        line += f"; rounding the weights moved them by up to {rounding:.2e}"
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
    config, files = weights.config.model, weights.tokenizer
    count = min(config.context, _TOKENS)
    novel = austen.novels()["Persuasion"][: 20 * count]
    ids: list[int] = []
    if FAST in files:
        ids = tokenizers.Tokenizer.from_buffer(files[FAST]).encode(novel, add_special_tokens=False).ids
    elif SENTENCEPIECE in files:
        ids = loaded(files[SENTENCEPIECE]).encode(novel)
    ids = [token for token in ids if token < config.vocabulary][:count]
    if ids:
        return torch.tensor([ids]), f"{len(ids)} tokens of Persuasion"
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(config.vocabulary, (1, count), generator=generator)
    return drawn, f"{math.prod(drawn.shape)} random tokens, there being no tokenizer"
