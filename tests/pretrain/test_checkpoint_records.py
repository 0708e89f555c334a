"""What a file's record says is what was written, whatever the disk made of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import Checkpointer
from pretrain.checkpoint.manifest import FileRecord, Manifest, RecordedFile
from tests.disk import watch
from tests.ranks import run_ranks

MB = 1 << 20


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 5000) | st.sampled_from([MB - 1, MB, MB + 1, 3 * MB, 3 * MB + 7]), max_size=8))
def test_the_record_is_that_of_the_file(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    path = tmp_path_factory.mktemp("record") / "file"
    noise = np.random.default_rng(0).integers(0, 256, 4 * MB, np.uint8)
    with RecordedFile(path) as file:
        for begin, size in enumerate(sizes):
            assert file.write(noise[begin : begin + size]) == size
        assert file.tell() == sum(sizes)
    assert path.read_bytes() == b"".join(noise[begin : begin + size].tobytes() for begin, size in enumerate(sizes))
    assert file.record == FileRecord.of(path)


def test_bytes_are_counted_not_elements(tmp_path: Path) -> None:
    with RecordedFile(tmp_path / "file") as file:
        assert file.write(np.arange(MB, dtype=np.float64)) == 8 * MB
    assert file.record == FileRecord.of(tmp_path / "file")
    assert file.record.bytes == 8 * MB


def test_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), RecordedFile(Path("/dev/full")) as file:
        file.write(bytes(3 * MB))


def save_while_the_disk_forgets(folder: Path, name: str) -> None:
    """The first byte of a file becomes another once it is synced, before the checkpoint is committed."""

    def forget(operation: str, path: str) -> None:
        if operation == "synced" and path.endswith(f".partial/{name}") and Path(path).stat().st_size:
            with open(path, "r+b") as file:
                file.write(b"?")

    watch(folder, forget)
    Checkpointer(folder, keep=1, keep_every=None).save(1, {"model": {"w": torch.ones(2 * MB)}}, {}, {})


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata.tmp"])
def test_what_the_disk_changes_before_the_commit_is_damage(tmp_path: Path, name: str) -> None:
    run_ranks(save_while_the_disk_forgets, 1, tmp_path, name)
    manifest = Manifest.read(tmp_path / "step-00000001")
    kept = name.removesuffix(".tmp")
    assert manifest.files.keys() == {"__0_0.distcp", ".metadata", "extras.json", "rank-00000.pt"}
    for file, record in manifest.files.items():
        assert (record == FileRecord.of(tmp_path / "step-00000001" / file)) == (file != kept)
