"""Every shell script and environment file of the repository passes shellcheck."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SUFFIXES = {".sh", ".sbatch", ".env"}


def scripts() -> list[str]:
    """By suffix or first line, whether committed or not, but not what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = []
    for name in sorted(set(listed.stdout.split("\0")) - {""}):
        path = REPOSITORY / name
        if path.is_file() and (path.suffix in SUFFIXES or path.read_bytes()[:64].startswith(SHEBANGS)):
            found.append(name)
    return found


SHEBANGS = (b"#!/bin/sh", b"#!/bin/bash", b"#!/usr/bin/env bash")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed; run `make cluster`")
def test_shellcheck_finds_nothing() -> None:
    names = scripts()
    assert {".ci/run", "tests/cluster/sim/start.sh"} <= set(names)
    # An environment file has no first line that names its shell, and is sourced by bash.
    environments = [name for name in names if name.endswith(".env")]
    said = ""
    for group, options in (([n for n in names if n not in environments], []), (environments, ["--shell=bash"])):
        if group:
            command = ["shellcheck", "--format=gcc", "--external-sources", *options, "--", *group]
            said += subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    assert not said
