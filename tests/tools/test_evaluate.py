"""Windows that score every token once, and a score that a plain loop over single tokens agrees with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from models.loss import IGNORE
from pretrain.data.source import TokenArray
from pretrain.trainer import Trainer
from tests.tools.small_run import prepare_small, small_config, small_text, train_small
from tools import evaluate
from tools.harness.text import windows
from tools.loading import load_run

LENGTH = 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("evaluate")
    return train_small(small_config(folder, prepare_small(folder)))


def call(monkeypatch: pytest.MonkeyPatch, run: Path, *options: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["evaluate", str(run), *options])
    evaluate.main()
    results: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return results


@given(st.integers(2, 200), st.integers(1, 40), st.data())
def test_each_token_is_scored_once_with_enough_context(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    text = np.arange(count) + 1000  # a token says where it stands
    scored: list[int] = []
    produced = list(windows(TokenArray([text]), length, stride, eos=0))
    for inputs, targets in produced:
        assert inputs.shape == targets.shape == (length,)
        for place in np.flatnonzero(targets != IGNORE):
            token = int(targets[place]) - 1000
            seen = inputs[: place + 1] - 1000  # what a causal model has before it
            assert seen.tolist() == list(range(token - len(seen), token))
            assert len(seen) >= min(token, length - stride + 1)
            scored.append(token)
    assert scored == list(range(1, count))
    assert len(produced) == 1 + math.ceil(max(0, count - 1 - length) / stride)  # what the progress bar counts to


def test_without_overlap_it_is_the_validation_of_training(
    trained: tuple[Trainer, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, run = trained
    assert trainer.validation is not None
    found = call(monkeypatch, run, "--stride", str(LENGTH))["validation"]
    # Batches of other sizes add the same fp32 terms in another order.
    assert found["loss"] == pytest.approx(trainer.validation.loss, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(trainer.validation.bits_per_byte, rel=1e-6)
    assert (found["step"], found["stride"], found["precision"]) == (4, LENGTH, "fp32")
    assert capsys.readouterr().out.startswith(f"validation: loss {trainer.validation.loss:.4f}, ")


def test_a_text_is_scored_as_one_token_at_a_time(
    trained: tuple[Trainer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = trained
    paths = [tmp_path / "a.txt", tmp_path / "ü.txt"]
    texts = [small_text(1000, 40), "Ein Käfer – " + small_text(1001, 30)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    results = call(monkeypatch, run, "--stride", "10", "--text", *map(str, paths))
    (found,) = (value for name, value in results.items() if "a.txt" in name)

    model, _, tokenizer, _ = load_run(run, torch.device("cpu"))
    eos = tokenizer.eos
    tokens = [eos, *tokenizer.encode(texts[0]), eos, *tokenizer.encode(texts[1]), eos]
    nats = 0.0
    for i in range(1, len(tokens)):
        # The first window begins at 0, the next ones every 10; a token belongs to the first that reaches it.
        start = max(0, math.ceil((i - LENGTH) / 10)) * 10
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:i]]))[0, -1]
        nats -= torch.log_softmax(logits.double(), 0)[tokens[i]].item()
    size = sum(len(text.encode()) for text in texts)
    assert (found["targets"], found["bytes"]) == (len(tokens) - 1, size)
    assert found["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)  # fp32 against fp64 softmax
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-4)


def test_results_of_other_texts_stay(
    trained: tuple[Trainer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = trained
    text = tmp_path / "b.txt"
    text.write_text(small_text(5, 10))
    call(monkeypatch, run)
    results = call(monkeypatch, run, "--text", str(text))
    assert results["validation"]["stride"] == LENGTH // 2
    assert str(text) in results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stride", "0"], "--stride is 0"),
        (["--stride", str(LENGTH + 1)], "from 1 to the sequence length, 32"),
        (["--split", "valdation"], "did you mean 'validation'"),
        (["--text", "none.txt"], "cannot read none.txt"),
        (["--text", "/dev/null"], "is empty"),
        (["--length", str(LENGTH + 1)], "from 1 to the model's context, 32"),
    ],
)
def test_mistakes_are_named(
    trained: tuple[Trainer, Path], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        call(monkeypatch, trained[1], *options)
    assert "\n" not in str(raised.value)


def test_data_of_another_tokenizer_is_refused(
    trained: tuple[Trainer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, run = trained
    other = tmp_path / "run"
    other.mkdir()
    for path in run.iterdir():
        (other / path.name).symlink_to(path)
    (other / "tokenizer.model").unlink()
    found = trainer.source.tokenizer_path.read_bytes()
    # An unknown protobuf field after the model: it loads as before, and is another file.
    (other / "tokenizer.model").write_bytes(found + b"\xfa\x3f\x01x")
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        call(monkeypatch, other)
    assert not (run / "evaluation.json").is_symlink()


def test_a_damaged_result_file_is_not_overwritten(
    trained: tuple[Trainer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = trained[1] / "evaluation.json"
    before = output.read_text() if output.exists() else None
    output.write_text("{")
    try:
        with pytest.raises(ConfigError, match=r"evaluation\.json is damaged"):
            call(monkeypatch, trained[1])
        assert output.read_text() == "{"
    finally:
        output.unlink()
        if before is not None:
            output.write_text(before)
