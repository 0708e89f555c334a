"""Files that survive: written whole or not at all, and folders held by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import ConfigError


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """A new or renamed entry survives a power cut only when the folder that names it is synced too (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """After a crash at any moment ``path`` has its old content or this one."""
    temporary = path.with_name(path.name + ".partial")
    write_synced(temporary, content)
    commit(temporary, path)


def commit(temporary: Path, path: Path) -> None:
    """Give a finished, synced file its name, durably."""
    temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold a folder against other processes; the lock ends with the process, however that ends.

    ``busy`` is the ConfigError's text if another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(busy) from error
        yield
    finally:
        os.close(handle)
