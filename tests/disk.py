"""What a process does on the disk, seen or made to fail at any operation, without a hook in the product.

Python audits each open, mkdir, rename and unlink, and fsync is wrapped. Nothing of this can be undone, so it is for
processes that a test starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

AUDITED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def watch(folder: Path, see: Callable[[str, str], None]) -> None:
    """Calls ``see(operation, path)`` at each operation of this process in ``folder``, from now to its end.

    It is called in the thread that operates, before the operation, and for fsync after it too, as "synced".
    """
    inside = str(folder)
    fsync = os.fsync

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in AUDITED and str(args[0]).startswith(inside):
            see(event, str(args[0]))

    def watched_fsync(fd: Any) -> None:
        path = os.readlink(f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}")
        see("fsync", path)
        fsync(fd)
        see("synced", path)

    os.fsync = watched_fsync
    sys.addaudithook(audit)


class Fault:
    """An OSError at the n-th operation of this process in a folder: set ``left`` to n."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number, self.left = number, 0
        watch(folder, self)

    def __call__(self, operation: str, path: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(self.number, os.strerror(self.number), path)
