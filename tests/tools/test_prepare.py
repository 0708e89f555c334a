from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from models.errors import ConfigError
from pretrain.data import Tokenizer
from pretrain.data.austen import documents as austen_documents
from pretrain.data.austen import novels
from pretrain.data.manifest import read_manifest
from tools import command, prepare, tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"local text needs no network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Chapters and lines, 120 documents of 1 to 3000 characters, two of them alike."""
    novel = novels()["Northanger Abbey"]
    starts = np.cumsum([(k * k * 7) % 3000 + 1 for k in range(120)])
    pieces = [novel[a:b] for a, b in zip([0, *starts], starts, strict=False)]
    return [*(piece for piece in pieces if not piece.isspace()), pieces[20]]


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = code_of(lambda: prepare.main([str(a) for a in arguments]))
    out, err = capsys.readouterr()
    return code, out, err


def code_of(main: Callable[[], None]) -> int:
    try:
        command.run(main)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def read_split(folder: Path, name: str) -> list[str]:
    """The documents of a split, from its shards with numpy alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    split = manifest["splits"][name]
    ids = np.concatenate([np.fromfile(folder / s["file"], manifest["dtype"]) for s in split["shards"]])
    ends = np.flatnonzero(ids == manifest["eos"])
    assert ends[-1] == len(ids) - 1 == split["tokens"] - 1
    tokenizer = Tokenizer(folder / "tokenizer.model")
    found = [tokenizer.decode(part[part != manifest["eos"]]) for part in np.split(ids, ends + 1)[:-1]]
    assert len(found) == split["documents"]
    assert sum(len(text.encode()) for text in found) == split["bytes"]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_austen_keeps_its_text_and_its_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "austen", "--output", tmp_path / "austen", "--vocab-size", 500)
    assert code == 0
    assert "ready" in out
    for split in ("train", "validation", "test"):
        assert read_split(tmp_path / "austen", split) == [text for s, text in austen_documents() if s == split]
    again = contents(tmp_path / "austen")
    code, out, _ = run(capsys, "austen", "--output", tmp_path / "austen", "--vocab-size", 500)
    assert (code, contents(tmp_path / "austen")) == (0, again)
    assert "nothing to do" in out


def test_documents_are_split_by_their_text(
    tmp_path: Path, texts: list[str], jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--vocab-size", 400, "--validation-fraction", 0.3, "--shard-tokens", 5000)
    assert run(capsys, jsonl, "--output", tmp_path / "a", *options)[0] == 0
    train, validation = read_split(tmp_path / "a", "train"), read_split(tmp_path / "a", "validation")
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)  # also not the document that is there twice
    assert [text for text in texts if text in set(train)] == train  # in the source's order
    # 120 documents, each in validation with probability 0.3: 36, with a standard deviation of 5
    assert 16 < len(validation) < 56

    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*reversed(texts), "one more"]))
    assert run(capsys, shuffled, "--output", tmp_path / "b", *options)[0] == 0
    assert set(validation) <= set(read_split(tmp_path / "b", "validation"))
    assert run(capsys, jsonl, "--output", tmp_path / "c", *options, "--seed", 1)[0] == 0
    assert set(validation) != set(read_split(tmp_path / "c", "validation"))


def test_every_kind_of_file_gives_the_same(
    tmp_path: Path, texts: list[str], jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:30]).encode()))
    column = pyarrow.array([*texts[30:60], None], pyarrow.large_string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / "b.parquet")
    (folder / "c.jsonl").write_text("\n".join(lines[60:-2]))
    (folder / "sub" / "d.txt").write_text(texts[-2], newline="")
    (folder / "sub" / "e.txt.gz").write_bytes(gzip.compress(texts[-1].encode()))
    (folder / "f.txt").write_text("")
    (folder / ".hidden.txt").write_text("not this")
    (folder / "note.md").write_text("nor this")
    options = ("--vocab-size", 400, "--validation-fraction", 0)
    assert run(capsys, jsonl, "--output", tmp_path / "a", *options)[0] == 0
    assert run(capsys, folder, "--output", tmp_path / "b", *options)[0] == 0
    assert sorted(read_split(tmp_path / "b", "train")) == sorted(texts)
    assert (tmp_path / "b" / "tokenizer.model").is_file()
    assert list(read_manifest(tmp_path / "b").splits) == ["train"]


def test_shards_have_one_size_and_the_dtype_follows_the_vocabulary(
    tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, jsonl, "--output", tmp_path / "a", "--vocab-size", 400, "--shard-tokens", 999)[0] == 0
    manifest = read_manifest(tmp_path / "a")
    sizes = [shard.tokens for shard in manifest.splits["train"].shards]
    assert len(sizes) > 10
    assert set(sizes[:-1]) == {999}
    assert 0 < sizes[-1] <= 999
    assert manifest.dtype == "<u2"
    assert not list((tmp_path / "a").glob("*.partial")) + list((tmp_path / "a").glob(".work"))
    # a given tokenizer gives the same tokens as when it was trained on the way, whatever the number of threads
    given = ("--tokenizer", tmp_path / "a" / "tokenizer.model", "--shard-tokens", 999, "--workers", 3)
    assert run(capsys, jsonl, "--output", tmp_path / "b", *given)[0] == 0
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {k: v for k, v in a.items() if k != "manifest.json"} == {k: v for k, v in b.items() if k != "manifest.json"}


# Forks a child for each moment at which a file gets its name, and kills it there, before or after.
DRILL = """
import os, signal, sys
from pathlib import Path
from pretrain import files
from pretrain.data import packing, preparation
from tools import prepare

arguments, kills = sys.argv[1:], 0
for attempt in range(200):
    child = os.fork()
    if child == 0:
        commit, calls = files.commit, 0
        def killing(temporary, path):
            global calls
            calls += 1
            if calls == 2 and attempt % 2: os.kill(os.getpid(), signal.SIGKILL)
            commit(temporary, path)
            if calls == 3: os.kill(os.getpid(), signal.SIGKILL)
        files.commit = packing.commit = killing
        prepare.main(arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status): break
    assert os.WTERMSIG(status) == signal.SIGKILL
    kills += 1
print("kills", kills)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_killed_at_every_other_commit_it_ends_with_the_same_bytes(
    tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(jsonl), "--vocab-size", "400", "--shard-tokens", "12000", "--validation-fraction", "0.1"]
    assert run(capsys, *options, "--output", tmp_path / "whole")[0] == 0
    done = subprocess.run(
        [sys.executable, "-c", DRILL, *options, "--output", str(tmp_path / "killed")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("kills")[1]) >= 5
    assert "going on with the interrupted preparation" in done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_process_killed_from_outside_goes_on(tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user's kill -9: at the moment when the first shards are there, whatever else is under way."""
    options = [str(jsonl), "--vocab-size", "400", "--shard-tokens", "2000"]
    output = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.prepare", *options, "--output", str(output)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and not (output / "train-00003.bin").exists():
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert not (output / "manifest.json").exists()
    with pytest.raises(ConfigError, match="holds no prepared data"):
        read_manifest(output)
    first = (output / "train-00000.bin").stat()
    assert run(capsys, *options, "--output", output)[0] == 0
    assert (output / "train-00000.bin").stat().st_mtime_ns == first.st_mtime_ns  # not made again
    assert run(capsys, *options, "--output", tmp_path / "whole")[0] == 0
    assert contents(output) == contents(tmp_path / "whole")


def test_another_preparation_in_the_folder_is_refused(
    tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(capsys, jsonl, "--output", output, "--vocab-size", 400, "--shard-tokens", 5000)[0] == 0
    before = contents(output)
    code, _, err = run(capsys, jsonl, "--output", output, "--vocab-size", 401, "--shard-tokens", 5000)
    assert code == 2
    assert err.count("\n") == 1
    assert "add --overwrite" in err
    assert contents(output) == before
    jsonl.write_text(jsonl.read_text().replace("Catherine", "Katherine"))  # another text under the same name
    assert run(capsys, jsonl, "--output", output, "--vocab-size", 400, "--shard-tokens", 5000)[0] == 2
    code, _, _ = run(capsys, jsonl, "--output", output, "--vocab-size", 400, "--overwrite")
    assert code == 0
    assert "Katherine" in "".join(read_split(output, "train"))
    assert len(list(output.glob("train-*"))) == 1  # the old shards are gone


def test_overwriting_repairs_a_damaged_folder(tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, options = tmp_path / "out", ("--vocab-size", 400)
    assert run(capsys, jsonl, "--output", output, *options)[0] == 0
    before = contents(output)
    (output / "train-00000.bin").write_bytes(b"")
    (output / "manifest.json").write_text("{")
    assert run(capsys, jsonl, "--output", output, *options)[0] == 2
    assert run(capsys, jsonl, "--output", output, *options, "--overwrite")[0] == 0
    assert contents(output) == before


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"", [], "the sources hold no text"),
        ("a.jsonl", b'{"text": " "}\n', [], "the sources hold no text"),
        ("a.jsonl", b'{"text": "x"}\n', ["--text-key", "txet"], "no column 'txet': did you mean 'text'?"),
        ("a.jsonl", b'{"text": 3}\n', [], "holds int, not text"),
        ("a.jsonl", b"\xff\xfe{]", [], "cannot be read as a dataset"),
        ("a.txt", b"\xff\xfe\xfd", [], "cannot be read as a dataset"),
        ("a.pdf", b"x", [], "is no text that can be read"),
        ("a.txt", b"few words", [], "no tokenizer with 4096 pieces can be trained on this text: write at most 2"),
        ("a.txt", b"few words", ["--vocab-size", "262"], "trained on this text: write at least 26"),
        ("a.txt", b"few words", ["--tokenizer", "none.model"], "none.model does not exist"),
        ("a.txt", b"few words", ["--validation-fraction", "1.5"], "validation fraction 1.5"),
        ("a.txt", b"few words", ["--shard-tokens", "0"], "shard tokens 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, options: list[str], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    code, out, err = run(capsys, tmp_path / name, "--output", tmp_path / "out", *options)
    assert code == 2
    assert out == ""
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "manifest.json").exists()
    # and the way is free for the right command
    (tmp_path / "b.txt").write_text(novels()["Persuasion"][:50_000])
    assert run(capsys, tmp_path / "b.txt", "--output", tmp_path / "out", "--vocab-size", 400)[0] == 0


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["missing.txt"], "missing.txt does not exist"),
        (["a/b/c"], "a/b/c does not exist"),
        (["austen", "x"], "name it alone"),
    ],
)
def test_sources_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sources: list[str], message: str
) -> None:
    code, _, err = run(capsys, *sources, "--output", tmp_path / "out")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_dataset_that_cannot_be_reached_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.prepare", "nobody/nothing", "--output", "/dev/null/out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_hub_dataset_is_known_by_its_revision(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    revision = "first"

    def builder(path: str, name: str | None) -> Any:
        assert (path, name) == ("owner/name", "clean")
        return SimpleNamespace(config=SimpleNamespace(name=name), hash=revision)

    def load(path: str, name: str | None, split: str) -> datasets.Dataset:
        assert (path, name, split) == ("owner/name", "clean", "main")
        return datasets.Dataset.from_dict({"body": texts, "n": list(range(len(texts)))})

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    options = ("--text-key", "body", "--subset", "clean", "--split", "main", "--vocab-size", 400)
    code, _, err = run(capsys, "owner/name", *options, "--output", tmp_path / "out")
    assert (code, err.count("error")) == (0, 0)
    assert sorted(read_split(tmp_path / "out", "train") + read_split(tmp_path / "out", "validation")) == sorted(texts)
    assert "nothing to do" in run(capsys, "owner/name", *options, "--output", tmp_path / "out")[1]
    revision = "second"
    assert run(capsys, "owner/name", *options, "--output", tmp_path / "out")[0] == 2


def test_tokenizer_tool_trains_what_prepare_would(
    tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, jsonl, "--output", tmp_path / "out", "--vocab-size", 400)[0] == 0
    file = tmp_path / "new" / "own.model"
    tokenizer.main(["train", str(jsonl), "--vocab-size", "400", "--output", str(file)])
    assert file.read_bytes() == (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert code_of(lambda: tokenizer.main(["train", str(jsonl), "--output", str(file)])) == 2
    capsys.readouterr()
    tokenizer.main(["show", str(file), "the abbey"])
    assert "vocabulary 400" in capsys.readouterr().out
