"""The command that lets a run speak: seeded, greedy, as tokens come, many prompts at once; mistakes in one line."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import Tokenizer
from tests.runs import ONE_THREAD, REPOSITORY
from tests.tools import calling
from tests.tools.small_run import WORDS, prepare_small, small_config, train_small
from tools import generate
from tools.loading import TrainedRun, load_run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run long enough to know its ten words."""
    folder = tmp_path_factory.mktemp("generate")
    config = small_config(folder, prepare_small(folder))
    config = replace(config, train=replace(config.train, steps=80, batch_tokens=256, micro_batch=8))
    return train_small(config)[1]


def speak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    calling.call(generate.main, monkeypatch, *arguments)
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
    assert tokenizer.eos not in tokens
    greedy = ["--prompt", "the dog", "--tokens", "40", "--temperature", "0"]
    expected = tokenizer.decode(tokens) + "\n"
    for seed in "01":
        assert speak(monkeypatch, capsys, trained, *greedy, "--seed", seed) == expected
    assert speak(monkeypatch, capsys, trained, *greedy, "--no-cache") == expected
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


def test_many_prompts_are_each_as_alone(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, then from the file; also where they are more than go through the model at once."""
    file = tmp_path / "prompts.txt"
    file.write_text("a mat\n\nand then the cat sat on the\n", encoding="utf-8")
    prompts = ["the dog", "", "a mat", "and then the cat sat on the"]
    few = ["--tokens", "20"]
    alone = [
        speak(monkeypatch, capsys, trained, *few, "--prompt", prompt, "--seed", str(7 + i))
        for i, prompt in enumerate(prompts)
    ]
    assert [text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True)] == [True] * 4
    batch = ["--prompt", "the dog", "--prompt", "", "--prompts", file, "--seed", "7"]
    for at_once in (64, 3, 1):
        monkeypatch.setattr(generate, "_AT_ONCE", at_once)
        assert speak(monkeypatch, capsys, trained, *few, *batch) == "---\n".join(alone)


def test_a_text_ends_where_the_document_does(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head's rows of one word and of the end are exchanged: the end comes where the word came, by the same draw."""

    def exchanged(path: Path, device: torch.device) -> TrainedRun:
        run = load_run(path, device)
        assert run.model.head is not None
        (word,) = run.tokenizer.encode(" cat")
        with torch.no_grad():
            run.model.head.weight[[word, run.tokenizer.eos]] = run.model.head.weight[[run.tokenizer.eos, word]]
        return run

    drawn = [trained, "--prompt", "the", "--seed", "3", "--speed"]
    free = speak(monkeypatch, capsys, *drawn)
    assert "cat" in free
    monkeypatch.setattr(generate, "load_run", exchanged)
    calling.call(generate.main, monkeypatch, *drawn)
    said = capsys.readouterr()
    assert said.out == free[: free.index(" cat")] + "\n"
    assert re.fullmatch(r"\d+ tokens in \d+\.\d\d s, \d+\.\d tokens/s\n", said.err)


class Terminal(io.StringIO):
    """What was there at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def flush(self) -> None:
        self.seen.append(self.getvalue())


def streamed(tokenizer: Tokenizer, row: list[int], added: list[int], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        generate._stream(tokenizer, list(row), ([token] for token in added))
    return terminal


def test_characters_are_written_whole_as_their_last_byte_comes(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, three and four bytes, none of them a piece of this tokenizer; and an end within a character."""
    tokenizer = Tokenizer(trained / "tokenizer.model")
    ids = tokenizer.encode("cat é€😀 sat")
    assert len(ids) > 9
    terminal = streamed(tokenizer, ids[:1], ids[1:], monkeypatch)
    assert len(terminal.seen) == len(ids) + 1, "at every token"
    assert terminal.getvalue() == "cat é€😀 sat\n"
    assert all("cat é€😀 sat\n".startswith(text) for text in terminal.seen)
    assert {"cat ", "cat é", "cat é€", "cat é€😀", "cat é€😀 sat"} <= set(terminal.seen)
    cut = ids[: ids.index(tokenizer.encode("😀")[-1])]
    terminal = streamed(tokenizer, ids[:1], cut[1:], monkeypatch)
    assert terminal.seen[-2] == "cat é€"
    assert terminal.getvalue() == tokenizer.decode(cut) + "\n"


@settings(max_examples=300)
@given(data=st.data())
def test_what_is_streamed_is_the_text(trained: Path, data: st.DataObject) -> None:
    """Of any tokens, bytes that make no character among them."""
    tokenizer = Tokenizer(trained / "tokenizer.model")
    token = st.one_of(st.integers(3, 258), st.integers(0, tokenizer.size - 1))
    row = data.draw(st.lists(token, min_size=1, max_size=4))
    added = data.draw(st.lists(token, max_size=12))
    with pytest.MonkeyPatch.context() as patch:
        assert streamed(tokenizer, row, added, patch).getvalue() == tokenizer.decode(row + added) + "\n"


MISTAKES: list[tuple[list[str], str]] = [
    (["--tokens", "0"], "--tokens is 0"),
    (["--tokens", "-3"], "--tokens is -3"),
    (["--temperature", "-0.1"], "--temperature is -0.1"),
    (["--temperature", "nan"], "--temperature is nan"),
    (["--top-p", "0"], "--top-p is 0.0"),
    (["--top-p", "1.5"], "--top-p is 1.5"),
    (["--seed", "-1"], "--seed is -1"),
    (["--seed", str(2**64)], "--seed is "),
    (["--seed", str(2**63 - 2), "--prompt", "", "--prompt", "", "--prompt", ""], "--seed is "),
    (["--prompt", "a \udcff"], "is not UTF-8"),
    (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: No such file"),
    (["--prompts", "."], "--prompts .: Is a directory"),
    (["--device", "cuda"], "no GPU is visible"),
]


fails = partial(calling.fails, generate.main)


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


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n\n", "there is no prompt in it"), (b"a \xff", "it is not UTF-8")]
)
def test_files_without_prompts_are_one_line(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert message in fails(monkeypatch, capsys, trained, "--prompts", file)


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
