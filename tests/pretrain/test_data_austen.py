from __future__ import annotations

import itertools
import lzma

from pretrain.data import austen


def test_the_novels_are_the_file_and_begin_with_their_titles() -> None:
    novels = austen.novels()
    assert "".join(novels.values()).encode() == lzma.decompress(austen.FILE.read_bytes())
    first_sentences = {
        "Emma": "Emma Woodhouse, handsome, clever, and rich",
        "Mansfield Park": "About thirty years ago Miss Maria Ward",
        "Northanger Abbey": "No one who had ever seen Catherine Morland",
        "Persuasion": "Sir Walter Elliot, of Kellynch Hall",
        "Pride and Prejudice": "It is a truth universally acknowledged",
        "Sense and Sensibility": "The family of Dashwood",
    }
    assert list(novels) == list(first_sentences)
    for title, text in novels.items():
        assert text.upper().startswith(title.upper() + "\n")
        assert first_sentences[title] in text[:2000]


def test_the_splits_are_the_documented_chunks() -> None:
    """Against the rule written down again: character by character, which split it belongs to."""
    novels = austen.novels()
    rest = "".join(text for title, text in novels.items() if title != "Persuasion")
    chunks = [rest[i : i + 40_000] for i in range(0, len(rest), 40_000)]
    documents = list(austen.documents())
    assert [text for split, text in documents if split == "test"] == [novels["Persuasion"]]
    for split in ("train", "validation"):
        expected = "".join(c for i, c in enumerate(chunks) if (i % 10 == 9) == (split == "validation"))
        assert "".join(text for s, text in documents if s == split) == expected


def test_a_document_ends_only_where_it_must() -> None:
    texts = [(split, text) for split, text in austen.documents() if split != "test"]
    titles = tuple(title.upper() + "\n" for title in austen.NOVELS)
    for (before, _), (after, text) in itertools.pairwise(texts):
        assert before != after or text.startswith(titles)
