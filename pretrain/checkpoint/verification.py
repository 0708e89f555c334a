"""Is a committed checkpoint still, to the byte, what was written? The ranks divide the files among themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pretrain.agreement import Ranks
from pretrain.checkpoint import commit
from pretrain.checkpoint.manifest import Damaged, FileRecord, Manifest, check_file, reading

_WORTH_A_BAR = 2**31  # bytes, a few seconds of SHA-256


@dataclass(frozen=True)
class Committed:
    """A checkpoint that is committed and whose files are those of its manifest."""

    step: int
    path: Path
    manifest: Manifest


def verified(ranks: Ranks, folder: Path, step: int) -> Committed:
    """Collective. The checkpoint of ``step``, or Damaged with the first problem found, on all ranks."""
    path = commit.committed_path(folder, step)
    manifest = ranks.first(lambda: Manifest.read(path))
    if manifest.step != step:
        raise Damaged.by(path, f"its manifest is of step {manifest.step}")
    ranks.together(lambda: _check(path, _share(manifest.files, ranks), quiet=ranks.rank != 0))
    return Committed(step, path, manifest)


def _share(files: dict[str, FileRecord], ranks: Ranks) -> dict[str, FileRecord]:
    """Every so-manieth file from the largest to the smallest, so that the shares are about equal in bytes."""
    largest_first = sorted(files, key=lambda name: (-files[name].bytes, name))
    return {name: files[name] for name in largest_first[ranks.rank :: ranks.size]}


def _check(path: Path, files: dict[str, FileRecord], quiet: bool) -> None:
    total = sum(record.bytes for record in files.values())
    columns = (TextColumn("verifying " + path.name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or total < _WORTH_A_BAR) as progress:
        task = progress.add_task("", total=total)
        for name, record in files.items():
            with reading(path, name), (path / name).open("rb") as file:
                check_file(path, name, record, progress.wrap_file(file, task_id=task))
