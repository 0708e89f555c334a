"""The adapter's answers against lm_eval's own ``hf`` model on the same weights, and against a table of probabilities.

Both compute in fp32 and add in different orders: logits differ by 1e-5, and sums over some forty tokens by up to 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from models import ConfigError, ModelConfig, Transformer
from pretrain.data import Tokenizer
from tests.models.building import scrambled, tiny
from tests.tools.judging import VOCABULARY, train_pieces, write_hub_folder
from tests.tools.small_run import small_text
from tools.harness import hub, native
from tools.harness.native import NativeLM

CONTEXT = 40
WORDS_BEGIN = 259  # after <unk>, <s>, </s> and the bytes
CLOSE = {"abs": 1e-4}


class Pair:
    """The same model twice."""

    def __init__(self, folder: Path) -> None:
        config = tiny(plan="llama", trunk="llama", tied=False, kv_heads=2, vocab_size=VOCABULARY, context=CONTEXT)
        self.model = scrambled(config)
        with torch.no_grad():  # words are likelier than single bytes, which make no text that two tokenizers agree on
            self.model.head.weight[:WORDS_BEGIN] = 0
        self.tokenizer = train_pieces(folder)
        self.folder = write_hub_folder(folder / "hub", self.model, config, self.tokenizer.path)
        loaded = hub.load_hub(self.folder, torch.device("cpu"), trust_remote_code=False)
        self.theirs = hub.as_lm(loaded, batch_size=3, bf16=False)

    def ours(self, batch_size: int = 3) -> NativeLM:
        return NativeLM(self.model, self.tokenizer, batch_size=batch_size)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def assert_same(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> None:
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], **CLOSE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_both_see_the_same(pair: Pair) -> None:
    ours, theirs = pair.ours(), pair.theirs
    assert (ours.max_length, ours.eot_token_id) == (theirs.max_length, theirs.eot_token_id) == (CONTEXT, 2)
    assert ours.prefix_token_id == theirs.prefix_token_id == 2
    for text in ("the cat", " the  cat ", "</s> is four letters", "naïve Käfer – 日本\n"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_log_likelihoods_of_texts(pair: Pair, batch_size: int) -> None:
    asked = requests(
        "loglikelihood",
        [
            ("the cat", " sat on a mat"),
            ("the cat ", "sat"),  # the space goes over to the continuation
            ("", "a dog ran"),
            ("", "a"),
            ("the dog", " ran"),
            ("the dog", " sat"),  # one context, several answers of one token and of more
            ("the dog", " mat and then"),
            ("the dog", " ran and then"),
            ("Ein Käfer –", " naïve 日本"),
            (small_text(1, 100), " the cat"),  # longer than the context
            (small_text(2, 20), " " + small_text(3, 24)),  # of the context next to nothing is left
        ],
    )
    theirs = pair.theirs.loglikelihood(asked, disable_tqdm=True)
    assert len({round(nats, 3) for nats, _ in theirs}) == len(asked)
    assert_same(pair.ours(batch_size).loglikelihood(asked, disable_tqdm=True), theirs)


@torch.no_grad()
def test_greedy_continuations_are_known(pair: Pair) -> None:
    random = torch.Generator().manual_seed(5)
    asked: list[tuple[tuple[str, str], list[int], list[int]]] = []
    for length in (1, 4, 9, CONTEXT):
        before = torch.randint(3, VOCABULARY, (length,), generator=random).tolist()
        row = list(before)
        for _ in range(5):
            row.append(int(pair.model(torch.tensor([row[-CONTEXT:]]))[0, -1].argmax()))
        greedy = row[length:]
        for continuation in (greedy[:1], greedy[: 5 if length < CONTEXT else 1], [*greedy[:-1], greedy[-1] ^ 1], [7]):
            asked.append((("", ""), before, continuation))
    ours = pair.ours()._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [True, True, False, False] * 4
    assert_same(ours, pair.theirs._loglikelihood_tokens(asked, disable_tqdm=True))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rolling_log_likelihoods(pair: Pair, batch_size: int) -> None:
    texts = ["a", small_text(1, 5), small_text(2, 90), "日本 – " + small_text(3, 40), small_text(4, 200), ""]
    lengths = [len(pair.tokenizer.encode(text)) for text in texts]
    assert max(lengths) > 4 * CONTEXT
    asked = requests("loglikelihood_rolling", [(text,) for text in texts])
    ours = pair.ours(batch_size).loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours[-1] == 0
    # each window of 40 tokens adds its rounding
    assert ours == pytest.approx(pair.theirs.loglikelihood_rolling(asked, disable_tqdm=True), abs=1e-3)


def test_generations(pair: Pair) -> None:
    prompts = ["the cat", "a", small_text(6, 12), small_text(7, 70), "Ein Käfer –", "and then the dog"]
    kinds: list[dict[str, Any]] = [
        {"until": [], "max_gen_toks": 14},
        {"until": ["\n", "t"], "max_gen_toks": 14, "do_sample": False},
        {"until": ["a", "e"], "max_new_tokens": 10, "temperature": 0.0},
    ]
    asked = requests("generate_until", [(prompt, kind) for prompt in prompts for kind in kinds])
    theirs = pair.theirs.generate_until(asked, disable_tqdm=True)
    # a stop string ended some early, and what it cut off was there
    assert sum(a != b for a, b in zip(theirs[::3], theirs[2::3], strict=True)) >= 2
    assert pair.ours().generate_until(asked, disable_tqdm=True) == theirs
    assert pair.ours(1).generate_until(asked, disable_tqdm=True) == theirs


def test_generation_ends_with_the_document(pair: Pair) -> None:
    """The weights changed so that </s> comes at once, in both."""
    head = pair.model.head.weight
    saved = head.detach().clone()
    asked = requests("generate_until", [("the cat", {"until": [], "max_gen_toks": 5})])
    (before,) = pair.ours().generate_until(asked, disable_tqdm=True)
    assert before
    with torch.no_grad():
        first = pair.model(torch.tensor([pair.tokenizer.encode("the cat")]))[0, -1].argmax()
        head[2] = 2 * head[first]
        pair.theirs.model.lm_head.weight.copy_(head)
    try:
        assert pair.ours().generate_until(asked, disable_tqdm=True) == [""]
        assert pair.theirs.generate_until(asked, disable_tqdm=True) == [""]
    finally:
        with torch.no_grad():
            head.copy_(saved)
            pair.theirs.model.lm_head.weight.copy_(saved)


def test_sampling_is_repeatable_and_varied(pair: Pair) -> None:
    kind = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", [("the cat", kind)] * 4)
    first = pair.ours().generate_until(asked, disable_tqdm=True)
    assert pair.ours().generate_until(asked, disable_tqdm=True) == first
    assert len(set(first)) > 1
    assert len(set(pair.ours(1).generate_until(asked, disable_tqdm=True))) > 1  # each batch has seeds of its own


def test_a_spelled_end_of_the_document_ends_a_text(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    said = pair.tokenizer.encode("the </s> cat")
    monkeypatch.setattr(native, "sample", lambda *_, **__: ([token] for token in said))
    asked = requests("generate_until", [("a", {"until": [], "max_gen_toks": 30})])
    assert pair.ours().generate_until(asked, disable_tqdm=True) == ["the "]


def test_a_blank_context_is_the_beginning_of_a_text(pair: Pair) -> None:
    """lm_eval's own model breaks on one: its spaces go over to the continuation, and nothing is left."""
    asked = requests("loglikelihood", [("  ", "cat"), ("", "  cat")])
    blank, empty = pair.ours().loglikelihood(asked, disable_tqdm=True)
    assert blank == empty


def test_what_a_run_does_not_do_is_refused(pair: Pair) -> None:
    with pytest.raises(ConfigError, match="generation with num_beams 4"):
        pair.ours().generate_until(requests("generate_until", [("a", {"num_beams": 4, "max_gen_toks": 3})]))
    with pytest.raises(ConfigError, match=r"continuation of .* tokens, more than the model's context of 40"):
        pair.ours().loglikelihood(requests("loglikelihood", [("a", small_text(0, 60))]), disable_tqdm=True)


def table_model(table: Sequence[Sequence[float]]) -> Transformer:
    """A model in fp64 whose probability of token j after token i is ``table[i][j]``, whatever stands before.

    Its blocks add nothing, a token's embedding has the mean square 1, which RMSNorm leaves alone, and the head reads
    off the logarithms.
    """
    width = 8
    config = ModelConfig(
        plan="llama", trunk="llama", width=width, depth=1, heads=2, vocab_size=len(table), context=4, tied=False,
        norm_eps=1e-20,
    )  # fmt: skip
    model = Transformer(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name == "final.weight" else 0.0)
        for i, row in enumerate(table):
            model.embedding.weight[i, i] = width**0.5
            model.head.weight[:, i] = torch.tensor(row, dtype=torch.float64).log() / width**0.5
    return model


def test_a_table_of_probabilities(pair: Pair) -> None:
    """P(1|0) = 1/2, P(3|1) = 1/4, P(0|3) = 1/10, and the end of a document, 2, is followed by 3 with 7/10."""
    table = [[0.1, 0.5, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.1, 0.7], [0.1, 0.2, 0.4, 0.3]]
    lm = NativeLM(table_model(table), pair.tokenizer, batch_size=2)
    asked: list[tuple[list[int], list[int]]] = [
        ([0], [1, 3]),
        ([3, 0], [1]),
        ([2, 2, 3, 0], [1]),
        ([0], [3]),
        ([0, 1, 2], [3]),
        ([2], [3, 2]),
        ([3, 3, 3, 3, 3, 3], [0, 1, 3]),  # the context of 4 cuts it
    ]
    expected = [
        (math.log(1 / 8), False),
        (math.log(1 / 2), True),
        (math.log(1 / 2), True),
        (math.log(1 / 5), False),
        (math.log(7 / 10), True),
        (math.log(0.28), True),
        (math.log(1 / 80), False),
    ]
    found = lm._loglikelihood_tokens([(("", ""), *each) for each in asked], disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-12)  # fp64
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


class _Letters(Tokenizer):
    """Ids written as digits."""

    def __init__(self) -> None:
        self.eos = 2

    def encode(self, text: str) -> list[int]:
        return [int(letter) for letter in text]


def test_a_text_by_the_table() -> None:
    """3 0 1 3 3 0 after the end of a document: 7/10, 1/10, 1/2, 1/4, 3/10, 1/10, over two windows of 4."""
    table = [[0.1, 0.5, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.1, 0.7], [0.1, 0.2, 0.4, 0.3]]
    lm = NativeLM(table_model(table), _Letters(), batch_size=2)
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("301330",)]), disable_tqdm=True)
    assert found == pytest.approx(math.log(0.7 * 0.1 * 0.5 * 0.25 * 0.3 * 0.1), abs=1e-12)
    (first,) = lm.loglikelihood(requests("loglikelihood", [("", "30")]), disable_tqdm=True)
    assert first == (pytest.approx(math.log(0.07), abs=1e-12), False)
