"""Sources to a prepared folder: split the documents, tokenize them, pack the tokens into shards, commit.

    documents -> split (by hash) -> ids and EOS, one document after the other -> train-00000.bin, train-00001.bin, …

What is done is noted in a work folder, so that a preparation that was killed goes on where it was and ends with the
same bytes. The manifest comes last; a folder without one is used by no one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from models.errors import ConfigError
from pretrain.data import austen, corpus
from pretrain.data.manifest import (
    FORMAT,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
    Split,
    read_manifest,
    sha256_of,
)
from pretrain.data.packing import Packer
from pretrain.data.tokenizer import Tokenizer, train_tokenizer
from pretrain.files import locked, write_atomically

AUSTEN = "austen"
_WORK = ".work"
_BATCH_BYTES = 1 << 22  # of text that is tokenized at once, dealt to the threads
_TRAINING_BYTES = 100_000_000  # of text that a tokenizer is trained on; more does not change its pieces much


@dataclass(frozen=True)
class Settings:
    """How to prepare. ``tokenizer`` is a sentencepiece model; without one, one with ``vocab_size`` ids is trained."""

    tokenizer: Path | None = None
    vocab_size: int = 4096
    text_key: str = "text"
    subset: str | None = None  # of hub datasets
    split: str = "train"  # of hub datasets
    validation_fraction: float = 0.01
    shard_tokens: int = 1 << 26
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ConfigError(f"validation fraction {self.validation_fraction} is none: write one from 0 to below 1")
        if self.shard_tokens < 1:
            raise ConfigError(f"shard tokens {self.shard_tokens}: write a positive number")


def prepare(
    sources: Sequence[str], output: Path, settings: Settings, *, workers: int, overwrite: bool = False
) -> tuple[Manifest, bool]:
    """Make ``output`` a prepared folder of these sources; (manifest, whether there was anything to do).

    ConfigError if a source cannot be read, there is no text in them, or the folder holds something else.
    """
    found = _find(sources)
    tokenizer = Tokenizer(settings.tokenizer) if settings.tokenizer else None
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, f"another preparation is at work in {output}: wait for it"):
        inputs = _describe(found, settings, tokenizer)
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        if not overwrite and (manifest := _committed(output, fingerprint)):
            return manifest, False
        work = _work_folder(output, fingerprint, overwrite=overwrite)
        documents = _documents(found, settings, work)
        tokenizer = tokenizer or _trained_tokenizer(work / TOKENIZER, documents, settings)
        _remove_committed(output)
        dtype = "<u2" if tokenizer.size <= 1 << 16 else "<u4"
        splits = {}
        for name, members in documents.splits.items():
            packer = Packer(output, name, dtype, settings.shard_tokens, work / f"{name}.json")
            shards = packer.pack(_tokenized(name, documents, members[packer.place :], tokenizer, workers))
            tokens = sum(shard.tokens for shard in shards)
            splits[name] = Split(tokens, len(members), int(documents.bytes[members].sum()), shards)
        write_atomically(output / TOKENIZER, tokenizer.path.read_bytes())
        manifest = Manifest(
            fingerprint=fingerprint,
            inputs=inputs,
            tokenizer_sha256=sha256_of(output / TOKENIZER),
            vocabulary=tokenizer.size,
            eos=tokenizer.eos,
            dtype=dtype,
            splits=splits,
        )
        manifest.write(output)
        shutil.rmtree(work)
        return manifest, True


def _committed(output: Path, fingerprint: str) -> Manifest | None:
    """What the folder holds already, if it holds anything; ConfigError if that is something else."""
    if not (output / MANIFEST).exists():
        return None
    manifest = read_manifest(output)
    if manifest.fingerprint != fingerprint:
        raise ConfigError(f"{output} was prepared from other sources or settings: add --overwrite to replace it")
    shutil.rmtree(output / _WORK, ignore_errors=True)  # killed between the manifest and the end
    return manifest


def _work_folder(output: Path, fingerprint: str, *, overwrite: bool) -> Path:
    """The folder of what is done so far, empty unless this preparation was interrupted."""
    work = output / _WORK
    begun = work / fingerprint
    if (output / MANIFEST).exists():  # to be overwritten: notes beside a manifest are about its shards
        shutil.rmtree(work, ignore_errors=True)
    elif begun.exists():
        _say(f"going on with the interrupted preparation of {output}")
    elif work.exists():
        if any(work.glob("*.json")) and not overwrite:
            raise ConfigError(
                f"{output} is half prepared with other sources or settings: add --overwrite to replace it"
            )
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    begun.touch()
    return work


def _remove_committed(output: Path) -> None:
    """Remove an earlier preparation that is to be overwritten: the manifest first, then what it names."""
    if (output / MANIFEST).exists():
        shards: list[Shard] = []
        with contextlib.suppress(ConfigError):  # a damaged manifest names nothing
            shards = [shard for split in read_manifest(output).splits.values() for shard in split.shards]
        (output / MANIFEST).unlink()
        for shard in shards:
            (output / shard.file).unlink(missing_ok=True)


def _trained_tokenizer(path: Path, documents: _Documents, settings: Settings) -> Tokenizer:
    if not path.exists():
        write_atomically(path, _train(documents, settings))
    return Tokenizer(path)


def _tokenized(
    name: str, documents: _Documents, members: np.ndarray, tokenizer: Tokenizer, threads: int
) -> Iterator[np.ndarray]:
    """The ids of each of these documents with EOS behind, under a progress bar."""
    with _progress() as progress:
        task = progress.add_task(f"tokenizing {name}", total=int(documents.bytes[members].sum()))
        for batch in documents.batches(members):
            texts = documents.texts(batch)
            for ids in tokenizer.encode_batch(texts, threads):
                yield np.append(ids, tokenizer.eos)
            progress.advance(task, int(documents.bytes[batch].sum()))


def tokenizer_for(sources: Sequence[str], settings: Settings) -> bytes:
    """The tokenizer that ``prepare`` would train on these sources, as the bytes of a ``.model`` file."""
    with tempfile.TemporaryDirectory() as work:
        documents = _documents(_find(sources), settings, Path(work))
        return _train(documents, settings)


def _find(sources: Sequence[str]) -> list[corpus.Source]:
    """What the sources name; nothing for the embedded corpus."""
    if AUSTEN not in sources:
        return [corpus.find(source) for source in sources]
    if len(sources) > 1:
        raise ConfigError("austen brings its own splits: name it alone")
    return []


def _train(documents: _Documents, settings: Settings) -> bytes:
    _say(f"training a tokenizer of {settings.vocab_size} pieces")
    return train_tokenizer(documents.sample(documents.splits["train"], settings.seed), settings.vocab_size)


def _describe(found: list[corpus.Source], settings: Settings, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All that the result depends on, and nothing that it does not: no paths, no number of workers."""
    described: list[dict[str, Any]] = []
    for source in found:
        described += source.describe(settings.subset)
    if not found:
        described.append({"embedded": AUSTEN, "sha256": sha256_of(austen.FILE)})
    used = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("tokenizer", "vocab_size")}
    made = {"sha256": sha256_of(tokenizer.path)} if tokenizer else {"trained": settings.vocab_size}
    return {"format": FORMAT, "sources": described, "tokenizer": made, "settings": used}


class _Documents:
    """All texts, how long they are, and which of them make up each split."""

    def __init__(self, texts: datasets.Dataset, splits: Sequence[str] | None, settings: Settings) -> None:
        self._texts = texts
        self.bytes = np.zeros(len(texts), np.int64)  # of UTF-8; 0 for those without a word, which are left out
        hashes = np.zeros(len(texts), np.uint64)
        key = settings.seed.to_bytes(8, "little", signed=True)
        with _progress() as progress:
            task = progress.add_task("reading", total=len(texts))
            for i, text in enumerate(self._all()):
                if corpus.is_document(text):
                    encoded = text.encode()
                    self.bytes[i] = len(encoded)
                    digest = hashlib.blake2b(encoded, digest_size=8, key=key).digest()
                    hashes[i] = int.from_bytes(digest, "little")
                progress.advance(task)
        kept = np.flatnonzero(self.bytes)
        if not len(kept):
            raise ConfigError("the sources hold no text: give files or datasets that do")
        if splits is not None:
            names = np.array(splits)
            self.splits = {name: kept[names[kept] == name] for name in dict.fromkeys(splits)}
            return
        # The text decides, not its place: copies of a document fall to the same side, and adding files moves none.
        order = kept[np.argsort(hashes[kept], kind="stable")]
        count = int(np.count_nonzero(hashes[order] < np.uint64(settings.validation_fraction * 2.0**64)))
        if settings.validation_fraction > 0 and not count and len(order) > 1:
            count = 1  # a few long documents: the one with the smallest hash
        if count == len(order):
            raise ConfigError("all documents fall to validation: lower the fraction or give more documents")
        self.splits = {"train": np.sort(order[count:])}
        if count:
            self.splits["validation"] = np.sort(order[:count])
        elif settings.validation_fraction > 0:
            _say("there is one document only: no validation split")

    def _all(self) -> Iterator[str | None]:
        everything = np.arange(len(self._texts))
        for batch in np.array_split(everything, max(1, len(everything) // 100)):
            yield from self.texts(batch)

    def texts(self, members: np.ndarray) -> list[str]:
        return self._texts[members][corpus.TEXT]

    def batches(self, members: np.ndarray) -> list[np.ndarray]:
        """These documents in their order, some megabytes at a time."""
        groups = np.cumsum(self.bytes[members]) // _BATCH_BYTES
        return np.split(members, np.flatnonzero(np.diff(groups)) + 1)

    def sample(self, members: np.ndarray, seed: int) -> Iterator[str]:
        """A random selection of these documents with the bytes that a tokenizer is trained on, in their order."""
        shuffled = np.random.default_rng(seed).permutation(members)
        enough = int(np.searchsorted(np.cumsum(self.bytes[shuffled]), _TRAINING_BYTES)) + 1
        for batch in self.batches(np.sort(shuffled[:enough])):
            yield from self.texts(batch)


def _documents(found: list[corpus.Source], settings: Settings, work: Path) -> _Documents:
    if not found:
        texts, splits = corpus.load_austen()
        return _Documents(texts, splits, settings)
    parts = [
        corpus.load(source, settings.text_key, work / "datasets", subset=settings.subset, split=settings.split)
        for source in found
    ]
    return _Documents(corpus.concatenate(parts), None, settings)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _say(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
