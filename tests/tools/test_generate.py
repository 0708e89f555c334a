"""The command that lets a run speak: seeded, greedy, from nothing, and mistakes in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.runs import ONE_THREAD, REPOSITORY
from tests.tools.small_run import WORDS, prepare_small, small_config, train_small
from tools import generate
from tools.command import run
from tools.loading import load_run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run long enough to know its ten words."""
    folder = tmp_path_factory.mktemp("generate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "hf"))
        config = small_config(folder, prepare_small(folder))
        config = replace(config, train=replace(config.train, steps=80, batch_tokens=256, micro_batch=8))
        yield train_small(config)[1]


def speak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    run(generate.main)
    return capsys.readouterr().out


def test_the_command_speaks_the_corpus_s_words(trained: Path) -> None:
    command = [sys.executable, "-m", "tools.generate", str(trained), "--prompt", "the cat", "--tokens", "60"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=ONE_THREAD, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the cat ")
    words = done.stdout.split()[:-1]  # the last may be cut
    assert len(words) > 10
    known = sum(word in WORDS for word in words)
    assert known / len(words) > 0.5, words


def test_seeds_repeat_and_differ(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {seed: speak(monkeypatch, capsys, trained, "--tokens", "40", "--seed", seed) for seed in "012"}
    assert len(set(said.values())) == 3
    assert speak(monkeypatch, capsys, trained, "--tokens", "40", "--seed", "1") == said["1"]
    assert speak(monkeypatch, capsys, trained, "--tokens", "40") == said["0"], "the default is repeatable"


@torch.no_grad()
def test_greedy_is_the_argmax_by_hand(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the trained weights, past the context of 32."""
    model, _, tokenizer, step = load_run(trained, torch.device("cpu"))
    assert step == 80
    tokens = tokenizer.encode("the dog")
    for _ in range(40):
        tokens.append(int(model(torch.tensor([tokens[-32:]]))[0, -1].argmax()))
    greedy = ["--prompt", "the dog", "--tokens", "40", "--temperature", "0"]
    expected = tokenizer.decode([token for token in tokens if token != tokenizer.eos]) + "\n"
    for seed in "01":
        assert speak(monkeypatch, capsys, trained, *greedy, "--seed", seed) == expected
    # The likeliest token alone is the smallest nucleus.
    narrow = ["--prompt", "the dog", "--tokens", "40", "--top-p", "1e-9"]
    assert speak(monkeypatch, capsys, trained, *narrow) == expected


def test_an_empty_prompt_begins_a_document(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, tokenizer, _ = load_run(trained, torch.device("cpu"))
    with torch.no_grad():
        first = int(model(torch.tensor([[tokenizer.eos]]))[0, -1].argmax())
    said = speak(monkeypatch, capsys, trained, "--tokens", "1", "--temperature", "0")
    assert said == tokenizer.decode([first]) + "\n"
    assert said.strip(), "a document begins with text"


MISTAKES: list[tuple[list[str], str]] = [
    (["--tokens", "0"], "--tokens is 0"),
    (["--tokens", "-3"], "--tokens is -3"),
    (["--temperature", "-0.1"], "--temperature is -0.1"),
    (["--temperature", "nan"], "--temperature is nan"),
    (["--top-p", "0"], "--top-p is 0.0"),
    (["--top-p", "1.5"], "--top-p is 1.5"),
    (["--seed", "-1"], "--seed is -1"),
    (["--seed", str(2**64)], "--seed is "),
    (["--device", "cuda"], "no GPU is visible"),
]


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as left:
        speak(monkeypatch, capsys, *arguments)
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a)[:30] for a, _ in MISTAKES])
def test_wrong_numbers_are_one_line(
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in fails(monkeypatch, capsys, trained, *arguments)


def test_folders_without_a_model_are_one_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not a run's folder" in fails(monkeypatch, capsys, tmp_path / "nowhere")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(trained / "config.yaml", begun)
    assert f"no checkpoint yet: train it first, python -m pretrain {begun}" in fails(monkeypatch, capsys, begun)
    shutil.copytree(trained / "checkpoints", begun / "checkpoints")
    assert "tokenizer" in fails(monkeypatch, capsys, begun)


def test_another_device_is_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        speak(monkeypatch, capsys, trained, "--device", "tpu")
    assert left.value.code == 2
    assert "invalid choice: 'tpu'" in capsys.readouterr().err
