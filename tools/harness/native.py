"""A run's model as lm_eval asks it, with the answers that lm_eval's own ``hf`` model gives on the exported folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance  # type: ignore[import-untyped]
from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text  # type: ignore[import-untyped]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import track
from torch import Tensor

from models import ConfigError, Transformer
from models.generation import sample
from pretrain.data import Tokenizer

_log = logging.getLogger(__name__)
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}

Row = tuple[int, ...]


class NativeLM(TemplateLM):
    """Answers in fp32, or by bf16 autocast; ``batch_size`` texts of similar length go through the model together.

    A text begins after the end of a document, as in training: that token stands where other models have a BOS, and none
    is put before a context that is not empty. What exceeds the model's context is cut off at the beginning. One
    difference stays: bytes that are no UTF-8 decode to other numbers of replacement characters in the two tokenizers.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, batch_size: int, bf16: bool = False) -> None:
        super().__init__()
        self._model, self._pieces, self._bf16 = model, tokenizer, bf16  # lm_eval's .tokenizer is one of transformers
        self._device = model.embedding.weight.device
        self.batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        return self._pieces.eos

    @property
    def max_length(self) -> int:
        return self._model.config.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._pieces.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Of each (_, context, continuation): the continuation's log-likelihood in nats, and whether it is greedy."""
        context = self.max_length
        asked: dict[Row, list[int]] = {}  # what the model reads -> the requests that this answers
        cut = 0
        for i, (_, before, continuation) in enumerate(requests):
            if len(continuation) > context:
                raise ConfigError(
                    f"a task asks for a continuation of {len(continuation)} tokens, more than the model's context of "
                    f"{context}: leave the task out"
                )
            whole = [*(before or [self.prefix_token_id]), *continuation]
            cut += len(whole) > context + 1
            asked.setdefault(tuple(whole[-context - 1 : -1]), []).append(i)
        if cut:
            _log.warning(
                "%d of %d requests exceed the context of %d tokens: their beginnings are cut off",
                *(cut, len(requests), context),
            )
        answers = [(0.0, True)] * len(requests)
        rows = sorted(asked, key=len, reverse=True)
        for batch in self._batches(rows, "log-likelihoods", disable_tqdm):
            for row, logits in zip(batch, self._logits(batch), strict=True):
                for i in asked[row]:
                    continuation = requests[i][2]
                    targets = torch.tensor(continuation, dtype=torch.int64, device=self._device)
                    scored = logits[len(row) - len(continuation) : len(row)]
                    nats = torch.log_softmax(scored, dim=-1).gather(-1, targets[:, None]).sum()
                    answers[i] = (nats.item(), bool((scored.argmax(dim=-1) == targets).all()))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts in nats: each token is scored once, in windows of the model's context."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((("", ""), *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += nats
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to, and without, the first of the strings ``until`` or the end of the document."""
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        texts = [""] * len(requests)
        for group in alike.values():
            settings = self._settings(requests[group[0]].args[1])
            room = self.max_length - settings["max_gen_toks"]
            assert room > 0, "tasks that leave none are refused when they are loaded"
            group.sort(key=lambda i: len(prompts[i]), reverse=True)
            for batch in self._batches(group, "generations", disable_tqdm):
                made = self._go_on([prompts[i][-room:] for i in batch], settings, seed=batch[0])
                for i, text in zip(batch, made, strict=True):
                    texts[i] = text
        return texts

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = normalize_gen_kwargs(dict(given))
        for key, value in settings.items():
            if key not in _GENERATION and (key, value) != ("num_beams", 1):
                raise ConfigError(
                    f"a task asks for generation with {key} {value}, which is not done here for a run: leave the task "
                    "out, or evaluate the folder that tools.convert --to hf makes"
                )
        return settings

    def _go_on(self, prompts: list[list[int]], settings: Mapping[str, Any], seed: int) -> list[str]:
        # The end of a document also ends a text where the model spells it.
        stops = [stop for stop in (*settings["until"], *self._pieces.pieces([self.eot_token_id])) if stop]
        greedy = not settings["do_sample"]
        steps = sample(
            self._model,
            prompts,
            settings["max_gen_toks"],
            temperature=0.0 if greedy else settings.get("temperature", 1.0),
            top_p=settings.get("top_p", 1.0),
            pieces=self._pieces.size,
            stop=self.eot_token_id,
            seed=seed,
        )
        rows: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        with self._autocast():
            for tokens in steps:
                for row, token in zip(rows, tokens, strict=True):
                    row += [] if token is None else [token]
                texts = [self._pieces.decode(row) for row in rows]
                ended = (
                    token is None or any(stop in text for stop in stops)
                    for token, text in zip(tokens, texts, strict=True)
                )
                if all(ended):
                    break
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _batches(self, items: Sequence[Any], what: str, silent: bool) -> Iterator[Sequence[Any]]:
        batches = [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]
        yield from track(batches, what, console=Console(stderr=True), transient=True, disable=silent)

    @torch.no_grad()
    def _logits(self, rows: Sequence[Row]) -> Tensor:
        """[rows, longest, vocabulary] in fp32, or the model's own precision if that is higher."""
        longest = max(map(len, rows))
        # what fills up stands after the text, where causal attention never looks
        filled = [[*row, *[self.eot_token_id] * (longest - len(row))] for row in rows]
        with self._autocast():
            logits: Tensor = self._model(torch.tensor(filled, device=self._device))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)
