"""The Checkpointer: all ranks save one checkpoint, agree on the newest whole one, and load it."""

from __future__ import annotations

import errno
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.filesize import decimal

from models.errors import ConfigError
from pretrain.agreement import Ranks
from pretrain.checkpoint import commit
from pretrain.checkpoint.manifest import Damaged, FileRecord, Manifest
from pretrain.checkpoint.tensors import bytes_of, load_tensors, read_metadata, save_tensors
from pretrain.checkpoint.verification import Committed, verified
from pretrain.files import write_synced

log = logging.getLogger(__name__)

_EXTRAS = "extras.json"


class Checkpointer:
    """Checkpoints of one run, in ``folder``, which all ranks see.

    A save has two phases. First every rank writes and syncs its files into a partial folder; then, when all have,
    rank 0 writes the manifest with sizes and checksums and renames the folder. Whatever happens before the rename, the
    step has no checkpoint; after it, it has a whole one. Every method but the constructor is collective, and a
    failure on one rank is raised on all. Mistakes and failing disks are ConfigError with one line.

    ``keep``: how many of the newest stay; ``keep_every``: steps that are its multiples stay for good. Older ones go
    only after a later one is committed, so there is room needed for ``keep + 1``.
    ``group``: a gloo group of all ranks; None in a process without torch.distributed. ``is_ours``: whether this run
    still holds the folder, asked of rank 0 before a commit.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None,
        group: dist.ProcessGroup | None = None,
        is_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        if keep < 1:
            raise ConfigError(f"checkpoint.keep is {keep}: write 1 or more, the newest checkpoint always stays")
        if keep_every is not None and keep_every < 1:
            raise ConfigError(f"checkpoint.keep_every is {keep_every}: write 1 or more, or null for none")
        self.folder, self.keep, self.keep_every, self._is_ours = folder, keep, keep_every, is_ours
        self.ranks = Ranks(group)

    def save(self, step: int, tensors: dict[str, Any], extras: dict[str, Any], rank_state: dict[str, Any]) -> Path:
        """Commits a checkpoint and returns its folder.

        ``tensors``: nested dictionaries of (D)Tensors and plain values, one entry a part ("model", "optimizer").
        ``extras``: JSON values; rank 0's are kept, and the dictionary ``extras["data"]`` is united over the ranks.
        ``rank_state``: this rank's own tensors and plain values.

        A step whose checkpoint is there and whole is left as it is: a step's state follows from the run alone. A
        damaged one is replaced. After a failure the partial folder is gone and the earlier checkpoints are untouched.
        """
        committed = commit.committed_path(self.folder, step)
        if not self._is_whole(step):
            try:
                self._write(step, tensors, extras, rank_state)
            except OSError as error:
                self._discard(step)
                raise ConfigError(self.ranks.first(partial(self._explain, step, error, tensors))) from error
            except Exception:
                self._discard(step)
                raise
        if self.ranks.rank == 0:
            self._prune(step)
        return committed

    def latest(self, until: int | None = None) -> Committed | None:
        """The newest whole checkpoint, of step ``until`` or before, the same on all ranks; None if none was committed.

        A damaged one is reported in one line (logging, rank 0) and the one before is tried. If all are damaged it is
        a ConfigError: to start over is the user's decision.
        """
        with _disk_errors(f"checkpoints in {self.folder} cannot be read"):
            steps = self.ranks.first(lambda: commit.committed_steps(self.folder))
            steps = [step for step in steps if until is None or step <= until]
            for step in reversed(steps):
                try:
                    return verified(self.ranks, self.folder, step)
                except Damaged as damage:
                    self._warn(f"{damage}; trying the one before")
        if steps:
            raise ConfigError(
                f"none of the {len(steps)} checkpoints in {self.folder} is whole: restore one from a copy, "
                "or write another --name to start over"
            )
        return None

    def load(self, committed: Committed, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Fills ``tensors`` in place, bit for bit, under any world size; returns extras and this rank's state.

        Parts of the checkpoint that ``tensors`` does not name are not read. The rank's state is None if the world size
        is not the one that saved. Raises ConfigError, and changes nothing, if a name, shape or dtype differs.
        """

        def own() -> tuple[dict[str, Any], dict[str, Any] | None]:
            extras = json.loads((committed.path / _EXTRAS).read_bytes())
            if committed.manifest.world_size != self.ranks.size:
                return extras, None
            state = torch.load(committed.path / _rank_file(self.ranks.rank), weights_only=True, map_location="cpu")
            return extras, state

        with _disk_errors(f"checkpoint {committed.path} cannot be read"):
            metadata = self.ranks.each(lambda: read_metadata(committed.path))
            self.ranks.together(lambda: load_tensors(committed.path, metadata, tensors, self.ranks.group))
            return self.ranks.each(own)

    def sweep(self) -> None:
        """Deletes what interrupted saves and removals left. For the start of a run, before anything is saved."""
        with _disk_errors(f"leftovers in {self.folder} cannot be deleted"):
            self.ranks.first(lambda: commit.sweep(self.folder))

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which are to be trained again and differently."""

        def drop() -> None:
            for later in commit.committed_steps(self.folder):
                if later > step:
                    commit.remove(self.folder, later)

        with _disk_errors(f"checkpoints in {self.folder} cannot be deleted"):
            self.ranks.first(drop)

    def _is_whole(self, step: int) -> bool:
        with _disk_errors(f"the checkpoint of step {step} in {self.folder} cannot be read"):
            if not self.ranks.first(commit.committed_path(self.folder, step).exists):
                return False
            try:
                verified(self.ranks, self.folder, step)
            except Damaged as damage:
                self._warn(f"{damage}; writing it again")
                return False
            return True

    def _discard(self, step: int) -> None:
        """As far as the disk allows; the next start sweeps the rest."""
        delete = partial(shutil.rmtree, commit.partial_path(self.folder, step), ignore_errors=True)
        self.ranks.first(delete)
        self.ranks.each(delete)  # finds something only where ranks do not share the folder

    def _write(self, step: int, tensors: dict[str, Any], extras: dict[str, Any], rank_state: dict[str, Any]) -> None:
        rank, folder = self.ranks.rank, commit.partial_path(self.folder, step)

        def own_files() -> dict[str, FileRecord]:
            state = io.BytesIO()  # a stream of Python's keeps the OSError that torch's own file writer would hide
            torch.save(rank_state, state)
            write_synced(folder / _rank_file(rank), state.getvalue())
            return written | {_rank_file(rank): FileRecord.of(folder / _rank_file(rank))}

        def commit_all() -> None:
            whole = extras | {"data": _united(data_of_ranks)}
            write_synced(folder / _EXTRAS, json.dumps(whole).encode())
            files = {_EXTRAS: FileRecord.of(folder / _EXTRAS)}
            for name, record in (entry for own in files_of_ranks for entry in own.items()):
                if not (folder / name).exists() or (folder / name).stat().st_size != record.bytes:
                    raise ConfigError(
                        f"rank 0 does not see {name} in {folder}, which another rank wrote: "
                        "set runs_dir to a folder that all nodes share"
                    )
                files[name] = record
            if not self._is_ours():
                raise ConfigError(f"another process has taken over {self.folder}: this one commits nothing")
            commit.commit(self.folder, Manifest(step, self.ranks.size, files))

        self.ranks.first(lambda: commit.begin(self.folder, step))
        written = self.ranks.each(lambda: save_tensors(folder, tensors, self.ranks.group))
        files_of_ranks = self.ranks.together(own_files)
        data_of_ranks = self.ranks.together(lambda: extras.get("data", {}))
        self.ranks.first(commit_all)

    def _prune(self, step: int) -> None:
        """What cannot be deleted stays and is reported: the new checkpoint is committed all the same."""
        # Steps after this one are damaged, or the run would have gone on from them; they count for nothing.
        steps = [committed for committed in commit.committed_steps(self.folder) if committed <= step]
        for old in commit.expired(steps, self.keep, self.keep_every):
            try:
                commit.remove(self.folder, old)
            except OSError as error:
                log.warning("checkpoint of step %d in %s cannot be deleted: %s", old, self.folder, error.strerror)

    def _explain(self, step: int, error: OSError, tensors: dict[str, Any]) -> str:
        untouched = "earlier checkpoints are untouched"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
            return (
                f"no space for the checkpoint of step {step} in {self.folder}: it takes about "
                f"{decimal(bytes_of(tensors))} and {decimal(shutil.disk_usage(existing).free)} are free "
                f"({error.strerror}): make room, lower checkpoint.keep, or move runs_dir to a larger disk; {untouched}"
            )
        return (
            f"the checkpoint of step {step} cannot be written: {error.filename or self.folder}: {error.strerror}: "
            f"mend that or set another runs_dir; {untouched}"
        )

    def _warn(self, message: str) -> None:
        if self.ranks.rank == 0:
            log.warning("%s", message)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _united(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One dictionary of all ranks' entries, which agree where they meet."""
    united: dict[str, Any] = {}
    for state in states:
        for key, value in state.items():
            assert united.setdefault(key, value) == value, f"ranks disagree about the data state {key!r}"
    return united


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    """An OSError as the user's one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{what}: {error.filename or ''}: {error.strerror}: mend that and start again") from error
