"""Ids of documents to the shard files of a split, so that a killed process loses at most one shard's work.

All shards but the last have the same number of tokens, so a document may go on in the next one. After each shard a note
says where the next begins; whoever is given the note continues there, and writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pretrain.data.manifest import Shard
from pretrain.files import commit, write_atomically


class Packer:
    """Writes ``folder/<name>-00000.bin`` and so on, in ``dtype``, and the note to the file ``note``.

    ``place`` is the document, counted from the split's first, with which ``pack`` wants to go on.
    """

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int, note: Path) -> None:
        self._folder = folder
        self._name = name
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._note = note
        self._shards: list[Shard] = []
        self.place = 0
        self._offset = 0  # the token of that document with which the next shard begins
        if note.exists():
            done = json.loads(note.read_text("utf-8"))
            self._shards = [Shard(**shard) for shard in done["shards"]]
            self.place, self._offset = done["place"], done["offset"]

    def pack(self, documents: Iterable[np.ndarray]) -> tuple[Shard, ...]:
        """The ids of the documents from ``place`` to the split's end, one after the other; all shards of the split."""
        shard = self._begin()
        for ids in documents:
            while self._offset < len(ids):
                taken = ids[self._offset :][: self._shard_tokens - shard.tokens]
                shard.write(taken)
                self._offset += len(taken)
                if shard.tokens == self._shard_tokens:
                    self._finish(shard)
                    shard = self._begin()
            self.place, self._offset = self.place + 1, 0
        if shard.tokens:
            self._finish(shard)
        else:
            shard.discard()
        return tuple(self._shards)

    def _begin(self) -> _ShardWriter:
        return _ShardWriter(self._folder / f"{self._name}-{len(self._shards):05d}.bin", self._dtype)

    def _finish(self, shard: _ShardWriter) -> None:
        self._shards.append(shard.commit())
        shards = [dataclasses.asdict(done) for done in self._shards]
        note = {"shards": shards, "place": self.place, "offset": self._offset}
        write_atomically(self._note, json.dumps(note).encode())


class _ShardWriter:
    def __init__(self, path: Path, dtype: str) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")
        self._sha256 = hashlib.sha256()
        self._dtype = dtype
        self.tokens = 0

    def write(self, ids: np.ndarray) -> None:
        content = ids.astype(self._dtype).tobytes()
        self._file.write(content)
        self._sha256.update(content)
        self.tokens += len(ids)

    def commit(self) -> Shard:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        commit(self._partial, self._path)
        return Shard(self._path.name, self.tokens, self._sha256.hexdigest())

    def discard(self) -> None:
        self._file.close()
        self._partial.unlink()
