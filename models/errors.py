"""The one error a user sees as a single line: what is wrong, where, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(Exception):
    """A mistake in what the user gave: a configuration, a file, a command line.

    Entry points print its message as one line on standard error and exit with code 2. A broken invariant of
    our own code is an ``assert`` instead, and keeps its traceback. ``agreed``: every rank raises it, so that one of
    them is enough to say it.
    """

    agreed = False


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint that names the candidate closest to ``name``, or all of them if none is close."""
    names = list(candidates)
    leaf = name.rsplit(".", 1)[-1]
    initials = "".join(word[:1] for word in leaf.split("_"))  # learning_rate for lr
    close = (
        difflib.get_close_matches(name, names, n=1, cutoff=0.8)
        or [c for c in names if c.rsplit(".", 1)[-1] in (leaf, initials)][:1]  # the right key in the wrong section
        or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    )
    if close:
        return f"did you mean {close[0]!r}?"
    return "choose one of " + ", ".join(names)
