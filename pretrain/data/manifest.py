"""A prepared folder: token shards, the tokenizer, and the manifest, whose presence says that the rest is complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from models.errors import ConfigError, nearest
from pretrain.files import write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
_WORTH_A_BAR = 2**31  # bytes, a few seconds of SHA-256


@dataclass(frozen=True)
class Shard:
    """One file of token ids, little-endian in the manifest's dtype, without a header."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of a split, to be read one after the other. ``bytes`` of UTF-8 text, ends of documents not counted."""

    tokens: int
    documents: int
    bytes: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds and what it was made from (``fingerprint`` is the hash of ``inputs``)."""

    fingerprint: str
    inputs: dict[str, Any]
    tokenizer_sha256: str
    vocabulary: int
    eos: int
    dtype: str
    splits: dict[str, Split]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_atomically(folder / MANIFEST, json.dumps(dataclasses.asdict(self), indent=1).encode())

    def split(self, name: str, folder: Path) -> Split:
        if name not in self.splits:
            raise ConfigError(f"{folder} has no split {name!r}: {nearest(name, self.splits)}")
        return self.splits[name]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed folder. ConfigError where there is none, or one of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no prepared data: run `python -m tools.prepare austen --output {folder}`, "
            "with your own text in place of austen if you have some"
        )
    try:
        raw = json.loads(path.read_text("utf-8"))
        if raw["format"] != FORMAT:
            raise ConfigError(f"{path} has format {raw['format']}, this version reads {FORMAT}: {_again(folder)}")
        splits = {
            name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
            for name, split in raw["splits"].items()
        }
        return Manifest(**{**raw, "splits": splits})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {_again(folder)}") from error


def open_split(
    folder: Path, manifest: Manifest, name: str, *, verify: bool, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """The split's shards, memory-mapped. Sizes are always checked; contents if ``verify``, by the ranks in turn.

    ConfigError names the file that is wrong, and the remedy.
    """
    dtype = np.dtype(manifest.dtype)
    arrays: list[np.ndarray] = []
    shards = manifest.split(name, folder).shards
    mine = {shard.file for shard in shards[rank::world_size]} if verify else set()
    for shard in _with_progress(shards, dtype.itemsize, quiet=not verify or rank != 0):
        path = folder / shard.file
        if not path.is_file():
            raise ConfigError(f"{path} is missing: {_again(folder)}")
        if path.stat().st_size != shard.tokens * dtype.itemsize:
            raise ConfigError(
                f"{path} has {path.stat().st_size} bytes instead of {shard.tokens * dtype.itemsize}: {_again(folder)}"
            )
        if shard.file in mine and sha256_of(path) != shard.sha256:
            raise ConfigError(f"{path} is corrupted (its SHA-256 differs): {_again(folder)}")
        arrays.append(np.memmap(path, dtype=dtype, mode="r"))
    return arrays


def _with_progress(shards: Sequence[Shard], item_bytes: int, *, quiet: bool) -> Iterable[Shard]:
    """The shards, under a bar if there is more to hash than a few seconds' worth."""
    if quiet or sum(shard.tokens for shard in shards) * item_bytes < _WORTH_A_BAR:
        return shards
    return track(shards, "verifying shards", console=Console(stderr=True), transient=True)


def tokenizer_path(folder: Path, manifest: Manifest) -> Path:
    """The folder's tokenizer, checked against the manifest."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {_again(folder)}")
    if sha256_of(path) != manifest.tokenizer_sha256:
        raise ConfigError(f"{path} is not the tokenizer that the shards were made with: {_again(folder)}")
    return path


def _again(folder: Path) -> str:
    return f"prepare {folder} again with tools.prepare and --overwrite"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
