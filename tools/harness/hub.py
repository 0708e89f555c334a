"""A Hugging Face folder as it is judged: its model and tokenizer through transformers, with no network."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ConfigError
from models.loss import IGNORE
from tools.harness.text import Scored

_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx")
_USUAL_LENGTH = 2048  # tokens in a window: models of far longer contexts need not see all of them to be compared
_AT_ONCE = 2048  # tokens: the logits of all are there together, and vocabularies are large


class HubModel(NamedTuple):
    """transformers' objects, the model in evaluation mode."""

    model: Any
    tokenizer: Any
    context: int


def is_hub_folder(folder: Path) -> bool:
    """Whether it has what such a folder has and a run's does not."""
    return (folder / "config.json").is_file()


def load_hub(folder: Path, device: torch.device, *, trust_remote_code: bool) -> HubModel:
    """A causal language model in the precision it is stored in. The folder's own Python code runs only if trusted."""
    # of CUDA libraries that are not here, of torch's enums, of texts longer than a window
    for noisy in ("torchao", "torch.utils._pytree", "transformers.tokenization_utils_base"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ConfigError("a Hugging Face folder needs transformers: pip install transformers") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, dtype="auto"
        )
    except Exception as error:  # whatever is wrong in a folder that others made
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{folder} needs Python code that is in it: read that, then write --trust-remote-code"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{folder}: transformers cannot load it: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{folder}: its tokenizer names no eos_token, which ends a document: add it")
    contexts = (getattr(model.config, name, None) for name in _CONTEXTS)
    context = next((value for value in contexts if value), _USUAL_LENGTH)
    return HubModel(model.to(device).eval(), tokenizer, context)


def precision(hub: HubModel) -> str:
    """What its weights are stored and computed in, by the names of our own configurations."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(hub.model.dtype, str(hub.model.dtype))


def scored(hub: HubModel, *, bf16: bool) -> Scored:
    """As texts are scored: no token is put before them but the tokenizer's BOS, or EOS if it has none, at the start."""
    model, tokenizer = hub.model, hub.tokenizer
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def nats(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")

    return Scored(
        nats,
        partial(tokenizer.encode, add_special_tokens=False, verbose=False),
        begin,
        tokenizer.eos_token_id,
        model.device,
        length=min(hub.context, _USUAL_LENGTH),
        context=hub.context,
        at_once=_AT_ONCE,
        settings={"precision": "bf16" if bf16 else precision(hub)},
    )


def as_lm(hub: HubModel, *, batch_size: int, bf16: bool) -> Any:
    """lm_eval's own ``hf`` model around it."""
    try:
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            f"lm_eval's hf model needs {error.name}: pip install --constraint constraints.txt '.[evaluate]'"
        ) from None
    log, said = logging.getLogger("lm_eval.models.huggingface"), set[int]()

    def once(record: logging.LogRecord) -> bool:
        """It would warn of every single request that exceeds the context."""
        first = record.lineno not in said
        said.add(record.lineno)
        return first

    log.setLevel(logging.ERROR)  # it warns that what a path can do is not asked of a model that is there
    lm = HFLM(
        hub.model,
        backend="causal",
        tokenizer=hub.tokenizer,
        max_length=hub.context,
        batch_size=batch_size,
        mixed_precision_dtype="bfloat16" if bf16 else None,
    )
    log.setLevel(logging.NOTSET)
    log.addFilter(once)
    return lm
