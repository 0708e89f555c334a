"""Where text comes from: the embedded corpus, files and folders, and Hugging Face datasets, all as `datasets`.

A text file is one document; a line of JSONL and a row of Parquet or of a hub dataset is one document.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import datasets

from models.errors import ConfigError, nearest
from pretrain.data import austen
from pretrain.data.manifest import sha256_of

datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises, and we say what it raises

TEXT = "text"  # the one column of what `load` gives

# suffix -> the builder of `datasets` that reads it; all but Parquet also compressed
_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".xz", ".zst")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One thing that the user named: ``files`` of text, or else a dataset on the hub."""

    name: str
    files: tuple[Path, ...] = ()

    def describe(self, subset: str | None) -> list[dict[str, Any]]:
        """What identifies the text, wherever it lies: hashes of all files, or the dataset's revision on the hub."""
        if not self.files:
            builder = _guarded(self.name, datasets.load_dataset_builder, self.name, name=subset)
            return [{"dataset": self.name, "subset": builder.config.name, "revision": builder.hash}]
        return [{"file": f.name, "bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in self.files]


def find(name: str) -> Source:
    """What ``name`` means: an existing file or folder, or else a dataset on the hub. ConfigError for neither."""
    path = Path(name)
    if path.is_file():
        if builder_of(path) is None:
            raise ConfigError(f"{name} is no text that can be read: give {_suffixes()}, or a folder of those")
        return Source(name, (path,))
    if path.is_dir():
        files = tuple(
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and builder_of(file) and not any(p.startswith(".") for p in file.relative_to(path).parts)
        )
        if not files:
            raise ConfigError(f"{name} holds no text: put {_suffixes()} into it")
        return Source(name, files)
    if not _HUB_NAME.fullmatch(name) or builder_of(path):
        raise ConfigError(f"{name} does not exist: give a file, a folder, or a dataset's name as owner/name")
    return Source(name)


def builder_of(path: Path) -> str | None:
    """The builder of `datasets` for this file, by its suffix; None if there is none."""
    suffix, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    if suffix in _COMPRESSED:
        return _BUILDERS.get(inner) if inner != ".parquet" else None
    return _BUILDERS.get(suffix)


def _suffixes() -> str:
    return f"{', '.join(_BUILDERS)} (text and JSON also {', '.join(_COMPRESSED)})"


def load(source: Source, text_key: str, cache: Path, *, subset: str | None, split: str) -> datasets.Dataset:
    """All documents of a source in order, in the one column ``TEXT``; files are converted into ``cache``."""
    if not source.files:
        return _text_column(_load(source.name, source.name, name=subset, split=split), text_key, source.name)
    parts = []
    for builder, group in itertools.groupby(source.files, key=builder_of):
        files = [str(file) for file in group if file.stat().st_size]  # an empty file is no document, nor an error
        if files:
            options = {"sample_by": "document"} if builder == "text" else {}
            part = _load(source.name, builder, data_files=files, split="train", cache_dir=str(cache), **options)
            parts.append(_text_column(part, TEXT if builder == "text" else text_key, source.name))
    return concatenate(parts)


def concatenate(parts: list[datasets.Dataset]) -> datasets.Dataset:
    """Datasets with the column ``TEXT`` as one; those without rows may have none."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return datasets.Dataset.from_dict({TEXT: []})
    if any(part.features != parts[0].features for part in parts):  # string and large_string do not concatenate
        parts = [part.cast(datasets.Features({TEXT: datasets.Value("large_string")})) for part in parts]
    return datasets.concatenate_datasets(parts)


def load_austen() -> tuple[datasets.Dataset, list[str]]:
    """The embedded corpus and the split of each of its documents."""
    splits, texts = zip(*austen.documents(), strict=True)
    return datasets.Dataset.from_dict({TEXT: list(texts)}), list(splits)


def stream(name: str, *, subset: str | None, split: str) -> datasets.IterableDataset:
    """The documents of a file, a folder or a hub dataset, read as they are asked for, with all their columns.

    A folder's splits are those that `datasets` sees in the names of its files.
    """
    source = find(name)
    if not source.files:
        return _load(name, name, name=subset, split=split, streaming=True)
    builders = sorted({builder_of(file) or "" for file in source.files})
    if len(builders) > 1:
        raise ConfigError(f"{name} mixes {' and '.join(builders)} files: stream one kind, or use tools.prepare")
    place: dict[str, Any] = {"data_dir": name} if Path(name).is_dir() else {"data_files": name}
    options = {"sample_by": "document"} if builders == ["text"] else {}
    return _load(name, builders[0], split=split, streaming=True, **place, **options)


def texts_of(rows: Iterable[dict[str, Any]], text_key: str, name: str) -> Iterator[str]:
    """The documents among these rows: those with more than white space in the column ``text_key``."""
    iterator = iter(rows)
    while (row := _guarded(name, next, iterator, None)) is not None:
        text = _text_of(row, text_key, name)
        if is_document(text):
            yield text


def is_document(text: str | None) -> TypeGuard[str]:
    return text is not None and text != "" and not text.isspace()


def _text_of(row: dict[str, Any], text_key: str, name: str) -> str | None:
    """The text of a row. ConfigError if it has no such column, or no text in it."""
    if text_key not in row:
        raise ConfigError(f"{name} has no column {text_key!r}: {nearest(text_key, row)}")
    text = row[text_key]
    if not isinstance(text, str | None):
        raise ConfigError(f"{name}: column {text_key!r} holds {type(text).__name__}, not text: name another one")
    return text


def _text_column(dataset: datasets.Dataset, text_key: str, name: str) -> datasets.Dataset:
    if not len(dataset):
        return dataset
    _text_of(dataset[0], text_key, name)
    dataset = dataset.select_columns(text_key)
    return dataset if text_key == TEXT else dataset.rename_column(text_key, TEXT)


def _load(about: str, path: str | None, /, **options: Any) -> Any:
    return _guarded(about, datasets.load_dataset, path, **options)


def _guarded(about: str, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
    """``function``'s result, its complaints as a ConfigError about ``about``."""
    try:
        return function(*arguments, **options)
    # There is no common base class: OSError and its kin for the network, ValueError for a wrong subset or split,
    # DatasetsError for what is not there or cannot be parsed, RuntimeError for a dataset that wants to run its code.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = (isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__) or error
        reason = " ".join(str(cause).split())[:300]
        raise ConfigError(f"{about} cannot be read as a dataset: {type(cause).__name__}: {reason}") from error
