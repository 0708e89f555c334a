"""A tool as its command line calls it, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.command import run


def call(main: Callable[[], None], patch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    """``main`` with such a command line, ended as commands here end."""
    patch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
    run(main)


def fails(
    main: Callable[[], None],
    patch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str | Path,
) -> str:
    """The one line that a mistake is answered with, on standard error and with exit code 2."""
    with pytest.raises(SystemExit) as left:
        call(main, patch, *arguments)
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err
