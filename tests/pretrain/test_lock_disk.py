"""The lock of a run's folder on a disk that refuses, among files that are not its own, and before a checkpoint."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from models.errors import ConfigError
from pretrain.checkpoint import Checkpointer
from pretrain.config import RunConfig, TrainConfig
from pretrain.distributed import World
from pretrain.lock import FolderLock, newest
from pretrain.run import RunFolder
from tests.runs import committed_steps


@pytest.mark.parametrize(
    "content", [b"", b'{"host": "a", "proc', b"[1]", b"null", b'{"who": "me"}', b"\xff\xfe", b'{"host": "a"}']
)
def test_a_file_that_names_nobody_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "owner" / "00000002.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        FolderLock(tmp_path, silence=30.0).acquire()
    assert str(raised.value).startswith(f"{path} does not say who trains there: remove it")
    assert path.read_bytes() == content


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "owner"
    folder.mkdir()
    for name in ("1 copy.json", "00000009.json.partial", "notes.json", ".far.17"):
        (folder / name).write_text("not ours")
    lock = FolderLock(tmp_path, silence=30.0)
    lock.acquire()
    assert newest(folder)[0] == 1
    lock.release()
    assert sum(path.read_text() == "not ours" for path in folder.iterdir()) == 4


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def claim(run: Path, tokenizer: Path) -> RunFolder:
    folder = RunFolder(run)
    folder.claim(RunConfig(train=TrainConfig(steps=10)), tokenizer, World(0, 1, torch.device("cpu")))
    return folder


def test_a_disk_that_takes_nothing_is_one_line(tmp_path: Path) -> None:
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(b"pieces")
    with small_disk(tmp_path) as disk:
        run = disk / "run"
        run.mkdir()
        filler = disk / "filler"
        fill(filler)
        with pytest.raises(ConfigError) as raised:
            claim(run, tokenizer)
        assert str(raised.value) == f"cannot write the run's folder {run}: No space left on device"

        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(ConfigError) as raised:
            claim(run, tokenizer)
        assert str(raised.value) == f"cannot write the run's folder {run}: Read-only file system"

        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        filler.unlink()
        folder = claim(run, tokenizer)
        assert folder.is_ours
        fill(filler)
        folder.release()  # a full disk is no second failure


def test_a_folder_that_could_not_be_had_whole_is_free(tmp_path: Path) -> None:
    """The lock was taken, the rest failed: who starts next is not held up."""
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="cannot write the run's folder"):
        claim(tmp_path / "run", tmp_path / "no tokenizer")
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(b"pieces")
    claim(tmp_path / "run", tokenizer).release()


def test_who_lost_the_folder_commits_nothing(tmp_path: Path) -> None:
    ours = True
    checkpointer = Checkpointer(tmp_path / "checkpoints", 1, None, None, lambda: ours)
    tensors = {"model": {"w": torch.arange(4.0)}}
    checkpointer.save(1, tensors, {"data": {}}, {})
    ours = False
    with pytest.raises(ConfigError, match=r"another process has taken over .*: this one commits nothing"):
        checkpointer.save(2, tensors, {"data": {}}, {})
    assert committed_steps(tmp_path) == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"], "and leaves nothing"


def test_the_run_s_folder_tells_the_checkpointer(tmp_path: Path) -> None:
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(b"pieces")
    folder = claim(tmp_path / "run", tokenizer)
    assert folder.is_ours
    (tmp_path / "run/owner/00000002.json").write_bytes((tmp_path / "run/owner/00000001.json").read_bytes())
    assert not folder.is_ours
    folder.release()
