"""Processes that are measured: each in a group of its own, which is killed at the end with the compilers it started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from typing import Any


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """The process, and what gives the last line that it has written to standard error. ``options``: of Popen."""
    with TemporaryFile() as said:

        def last() -> str:
            said.seek(0)
            return (said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]

        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True, **options)
        try:
            yield process, last
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
