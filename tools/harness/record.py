"""The functions of record.yaml: ReCoRD (arXiv 1810.12885) with the prompts and metrics of lm_eval's task of that name,
whose own code needs a part of transformers that is gone in version 5."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]


def documents(dataset: Any) -> Any:
    """A dataset with every entity and every answer once, in order."""
    return dataset.map(lambda doc: {key: sorted(set(doc[key])) for key in ("entities", "answers")})


def prompt(doc: Document) -> str:
    """The passage, and its highlights as a list that the model goes on with."""
    passage, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return f"{passage}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def choices(doc: Document) -> list[str]:
    """One more highlight, with each entity in the place of the gap."""
    return [_highlight(doc, entity) for entity in doc["entities"]]


def target(doc: Document) -> str:
    """The highlight with the first of the right entities."""
    return _highlight(doc, doc["answers"][0])


def _highlight(doc: Document, entity: str) -> str:
    return f"  - {doc['query']}".replace("@placeholder", entity)


def scores(doc: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Of the likeliest entity, against the nearest answer: ``f1`` of their words, ``em`` if they are the same.

    ``acc`` is ``em`` under the name of the other tasks' metric, so that a group can average it with them.
    """
    likelihoods = [likelihood for likelihood, _ in results]
    said = _words(doc["entities"][likelihoods.index(max(likelihoods))])
    answers = [_words(answer) for answer in doc["answers"]]
    exact = float(said in answers)
    return {"f1": max(_f1(said, answer) for answer in answers), "em": exact, "acc": exact}


def _words(text: str) -> list[str]:
    """As SQuAD compares answers (arXiv 1606.05250): lower case, without punctuation and articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(said: list[str], answer: list[str]) -> float:
    if not said or not answer:
        return float(said == answer)
    return 2 * (Counter(said) & Counter(answer)).total() / (len(said) + len(answer))
