"""The manifest: what a committed checkpoint consists of, to the byte."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from models.errors import ConfigError

MANIFEST = "manifest.json"


class Damaged(ConfigError):
    """A checkpoint's files are not the ones that were committed."""

    @classmethod
    def by(cls, path: Path, problem: str) -> Damaged:
        return cls(f"checkpoint {path} is damaged: {problem}")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        with path.open("rb") as file:
            return cls(os.fstat(file.fileno()).st_size, sha256(file))


class RecordedFile(io.BufferedWriter):
    """A new file that knows, once it is written, the record that reading it again would give.

    What is recorded are the bytes that it was given: if the disk keeps others, the checkpoint is found damaged.
    """

    _PORTION = 1 << 20  # bytes: fewer are hashed sooner than handed over, and Linux takes far more in twice the time

    def __init__(self, path: Path) -> None:
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._thread = ThreadPoolExecutor(1, "sha256")
        super().__init__(io.FileIO(path, "w"))

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._size, self._sha256.hexdigest())

    def write(self, content: Any) -> int:
        """Hashes and writes a buffer's bytes at the same time: neither holds the interpreter's lock."""
        view = memoryview(content).cast("B")
        self._size += view.nbytes
        if view.nbytes < self._PORTION:
            self._sha256.update(view)
            return super().write(view)
        hashing = self._thread.submit(self._sha256.update, view)
        try:
            for at in range(0, view.nbytes, self._PORTION):
                super().write(view[at : at + self._PORTION])
            return view.nbytes
        finally:
            hashing.result()  # whatever happened, the memory is the caller's again

    def close(self) -> None:
        self._thread.shutdown()
        super().close()


@dataclass(frozen=True)
class Manifest:
    """``files``: every file of the checkpoint but the manifest itself, by name."""

    step: int
    world_size: int
    files: dict[str, FileRecord]

    def to_json(self) -> str:
        """Carries a checksum of itself, so that a damaged manifest never sends the search for damage elsewhere."""
        body = asdict(self)
        return json.dumps({**body, "sha256": _digest(body)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises Damaged, OSError."""
        path = folder / MANIFEST
        with reading(folder, MANIFEST):
            text = path.read_bytes()
        try:
            body = json.loads(text)
            expected = body.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError):  # not JSON, not UTF-8, not an object, not ours
            raise Damaged.by(folder, f"{MANIFEST} is not a manifest") from None
        if _digest(body) != expected:
            raise Damaged.by(folder, f"{MANIFEST} does not match its own checksum")
        return cls(**(body | {"files": {name: FileRecord(**record) for name, record in body["files"].items()}}))


@contextmanager
def reading(folder: Path, name: str) -> Iterator[None]:
    """A file that is gone or that the disk fails to read is damage; what a user can mend stays an OSError."""
    try:
        yield
    except FileNotFoundError:
        raise Damaged.by(folder, f"{name} is missing") from None
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise Damaged.by(folder, f"{name} cannot be read: {error.strerror}") from error


def check_file(folder: Path, name: str, record: FileRecord, file: BinaryIO) -> None:
    """Raises Damaged unless the open file ``name`` of ``folder`` is the one recorded."""
    size = os.fstat(file.fileno()).st_size
    if size != record.bytes:
        raise Damaged.by(folder, f"{name} has {size} bytes, {record.bytes} were written")
    if sha256(file) != record.sha256:
        raise Damaged.by(folder, f"{name} does not match its checksum")


def sha256(file: BinaryIO) -> str:
    """Of the rest of an open file, in hexadecimal."""
    readable = cast(Any, file)  # file_digest asks for readinto, which files have and typing.BinaryIO lacks
    return hashlib.file_digest(readable, "sha256").hexdigest()


def _digest(body: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
