"""The states of a checkpoint's folder, told apart by its name alone.

    .step-00001000.partial    being written; nothing ever reads it
    step-00001000             committed
    .step-00001000.removed    being deleted; nothing ever reads it

A rename moves a folder from one state to the next in one indivisible step, and everything in it is on the disk before
the rename that commits it. A crash therefore leaves each checkpoint in exactly one state; `sweep` clears the first and
the last. These functions belong to one process: rank 0 calls them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from pretrain.checkpoint.manifest import MANIFEST, Manifest
from pretrain.files import sync_folder, write_synced

_COMMITTED = re.compile(r"step-(\d{8,})")
_UNCOMMITTED = re.compile(r"\.step-\d{8,}\.(partial|removed)")


def committed_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def partial_path(folder: Path, step: int) -> Path:
    return folder / f".step-{step:08d}.partial"


def committed_steps(folder: Path) -> list[int]:
    """Ascending; whether their files are whole is for the manifest to say."""
    if not folder.exists():
        return []
    matches = (_COMMITTED.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def begin(folder: Path, step: int) -> None:
    """An empty partial folder."""
    folder.mkdir(parents=True, exist_ok=True)
    discard(folder, step)
    partial_path(folder, step).mkdir()


def commit(folder: Path, manifest: Manifest) -> None:
    """Makes the partial folder, whose other files are complete and synced, the committed one.

    A committed folder of the same step is taken away first: the caller has found it damaged.
    """
    partial, committed = partial_path(folder, manifest.step), committed_path(folder, manifest.step)
    write_synced(partial / MANIFEST, manifest.to_json().encode())
    sync_folder(partial)
    if committed.exists():
        remove(folder, manifest.step)
    partial.rename(committed)
    sync_folder(folder)


def discard(folder: Path, step: int) -> None:
    """Deletes the partial folder, if there is one."""
    if partial_path(folder, step).exists():
        shutil.rmtree(partial_path(folder, step))


def remove(folder: Path, step: int) -> None:
    """Deletes a committed checkpoint, which stops being one before its first file goes."""
    removed = folder / f".step-{step:08d}.removed"
    if removed.exists():
        shutil.rmtree(removed)
    committed_path(folder, step).rename(removed)
    sync_folder(folder)
    shutil.rmtree(removed)


def sweep(folder: Path) -> None:
    """Deletes what an interrupted save or removal left."""
    if not folder.exists():
        return
    for entry in list(folder.iterdir()):
        if _UNCOMMITTED.fullmatch(entry.name):
            shutil.rmtree(entry)


def expired(steps: Collection[int], keep: int, keep_every: int | None) -> list[int]:
    """The steps to delete: neither among the ``keep`` newest nor a multiple of ``keep_every``."""
    newest = sorted(steps)[-keep:]
    return [step for step in sorted(steps) if step not in newest and (keep_every is None or step % keep_every != 0)]
