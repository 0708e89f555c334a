"""The corpus that ships with the project: Jane Austen's six novels, with a fixed split (README.md beside this file)."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_name("austen.txt.xz")
NOVELS = (
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
)
TEST_NOVEL = "Persuasion"
CHUNK_CHARACTERS = 40_000
VALIDATION_EVERY = 10


def novels() -> dict[str, str]:
    """Title -> text, in the file's order; the values joined are the file."""
    text = lzma.decompress(FILE.read_bytes()).decode("utf-8")
    starts = [_title_position(text, title) for title in NOVELS]
    assert [0, *sorted(starts[1:])] == starts, starts
    ends = [*starts[1:], len(text)]
    return {title: text[a:b] for title, a, b in zip(NOVELS, starts, ends, strict=True)}


def _title_position(text: str, title: str) -> int:
    # A novel begins with its title alone on a line, in capitals or not, and the author's name within a few lines.
    found = [m.start() for m in re.finditer(rf"(?im)^{title}\n(?=(?:.*\n){{0,6}}?.*jane austen)", text)]
    assert len(found) == 1, f"{title} begins at {found}"
    return found[0]


def documents() -> Iterator[tuple[str, str]]:
    """(split, text) in the order of the text: the longest pieces that lie in one novel and one split."""
    position = 0  # in the concatenation of the novels other than the test novel
    for title, text in novels().items():
        if title == TEST_NOVEL:
            yield "test", text
            continue
        end = position + len(text)
        pieces: list[tuple[str, int, int]] = []
        start = position
        while start < end:
            chunk = start // CHUNK_CHARACTERS
            stop = min((chunk + 1) * CHUNK_CHARACTERS, end)
            split = "validation" if chunk % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"
            if pieces and pieces[-1][0] == split:
                pieces[-1] = (split, pieces[-1][1], stop)
            else:
                pieces.append((split, start, stop))
            start = stop
        for split, a, b in pieces:
            yield split, text[a - position : b - position]
        position = end
