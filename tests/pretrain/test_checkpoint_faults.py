"""Saves that are killed, refused or starved at every single operation on the disk: at the n-th one, for every n."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.errors import ConfigError
from pretrain.checkpoint import Checkpointer
from tests.disk import Fault, watch
from tests.ranks import RankError, fork_server, run_ranks


def state(step: int, elements: int = 5) -> dict[str, Any]:
    return {
        "model": {"weight": torch.arange(elements) + float(step), "alpha": torch.full((1,), float(step))},
        "optimizer": {"lr": 0.1 * step, "betas": (0.9, 0.95)},
    }


def checkpointer(folder: Path, keep: int = 2) -> Checkpointer:
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    return Checkpointer(folder, keep=keep, keep_every=None, group=group)


def save(folder: Path, step: int, keep: int = 2, elements: int = 5) -> Path:
    return checkpointer(folder, keep).save(step, state(step, elements), {"step": step}, {"draws": step})


def latest_step(folder: Path) -> int:
    """The newest checkpoint's step, once it is sure that its contents are that step's."""
    loader = checkpointer(folder)
    committed = loader.latest()
    assert committed is not None
    tensors = state(0)
    extras, rank_state = loader.load(committed, tensors)
    expected = state(committed.step)
    assert tensors["model"]["weight"].equal(expected["model"]["weight"])
    assert tensors["model"]["alpha"].equal(expected["model"]["alpha"])
    assert tensors["optimizer"] == expected["optimizer"]
    assert extras["step"] == committed.step
    assert rank_state == {"draws": committed.step}
    return committed.step


def uncommitted(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("pretrain")]


def killed_save(folder: Path, moment: int) -> None:
    seen = 0

    def kill(operation: str, path: str) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    watch(folder, kill)
    save(folder, 3)


def run_killed(folder: Path, moment: int) -> bool:
    """Whether the save was killed, not finished before."""
    process = fork_server().Process(target=killed_save, args=(folder, moment))
    process.start()
    process.join(timeout=60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_kill_at_every_operation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tmp_path / "base"
    for step in (1, 2):
        save(base, step)
    found: list[int] = []
    while True:
        folder = tmp_path / f"killed-{len(found)}"
        shutil.copytree(base, folder)
        was_killed = run_killed(folder, moment=len(found) + 1)
        found.append(latest_step(folder))
        checkpointer(folder).sweep()
        assert not uncommitted(folder)
        assert latest_step(folder) == found[-1]
        save(folder, 3)
        assert latest_step(folder) == 3
        assert sorted(os.listdir(folder)) == ["step-00000002", "step-00000003"]
        shutil.rmtree(folder)
        if not was_killed:
            break
    assert found == sorted(found), "a checkpoint that was committed is gone again"
    assert found.count(2) > 15, "the faults did not reach the writing"
    assert found.count(3) > 5, "the faults did not reach the pruning"
    assert not warnings_in(caplog), "an interrupted save looked like a damaged checkpoint"


def record_save(folder: Path) -> list[tuple[str, str]]:
    operations: list[tuple[str, str]] = []
    watch(folder, lambda operation, path: operations.append((operation, path)))
    save(folder, 3)
    return operations


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path) -> None:
    [operations] = run_ranks(record_save, 1, tmp_path)
    partial = str(tmp_path / ".step-00000003.partial")
    renamed = operations.index(("os.rename", partial))
    synced = {path for operation, path in operations[:renamed] if operation == "synced"}
    files = {f"{partial}/{name}" for name in os.listdir(tmp_path / "step-00000003")}
    assert f"{partial}/manifest.json" in files
    # DCP syncs its map under a passing name.
    assert {path.removesuffix(".tmp") for path in synced} == {partial, *files}
    assert ("synced", str(tmp_path)) in operations[renamed:]


def fail_everywhere(root: Path, faulty_rank: int, number: int) -> list[tuple[str | None, int]]:
    """Saves step 3 again and again, each time with the next operation of one rank failing.

    Returns the error that this rank saw and the latest step afterwards, for each save.
    """
    outcomes: list[tuple[str | None, int]] = []
    for step in (1, 2):
        save(root / "base", step)
    fault = Fault(root, number)
    reached = [True]
    while reached[0]:
        folder = root / str(len(outcomes))
        if dist.get_rank() == 0:
            shutil.copytree(root / "base", folder)
        dist.barrier()
        fault.left = len(outcomes) + 1 if dist.get_rank() == faulty_rank else 0
        message = None
        try:
            save(folder, 3)
        except ConfigError as error:
            message = str(error)
            assert not uncommitted(folder)
            assert (folder / "step-00000001").exists(), "pruned although the save failed"
        reached = [fault.left <= 0]
        fault.left = 0
        dist.broadcast_object_list(reached, src=faulty_rank)
        outcomes.append((message, latest_step(folder)))
        dist.barrier()
    return outcomes


@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_an_error_at_every_operation_of_one_rank_is_an_error_on_all(tmp_path: Path, faulty_rank: int) -> None:
    outcomes, other = run_ranks(fail_everywhere, 2, tmp_path, faulty_rank, errno.EIO)
    assert outcomes == other
    errors = [error for error, _ in outcomes if error is not None]
    assert len(errors) >= (15 if faulty_rank == 0 else 5)
    for error in errors:
        assert "\n" not in error
        assert "step 3 cannot be written" in error
        assert "Input/output error" in error
    # No error: the operation was one that may fail, such as making a folder that exists, or pruning.
    assert all(step == 3 for error, step in outcomes if error is None)
    # Only the sync after the rename (open, fsync, its return) can fail and leave the step committed.
    assert [step for error, step in outcomes if error is not None].count(3) == (3 if faulty_rank == 0 else 0)


def fail_reading_everywhere(folder: Path, faulty_rank: int) -> list[int | str]:
    """The step that is found and loaded, or the error, with each operation of one rank failing in turn."""
    for step in (1, 2):
        save(folder, step)
    fault = Fault(folder, errno.EIO)
    outcomes: list[int | str] = []
    reached = [True]
    while reached[0]:
        fault.left = len(outcomes) + 1 if dist.get_rank() == faulty_rank else 0
        try:
            outcomes.append(latest_step(folder))
        except ConfigError as error:
            outcomes.append(str(error))
        reached = [fault.left <= 0]
        dist.broadcast_object_list(reached, src=faulty_rank)
    return outcomes


@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_a_read_error_of_one_rank_parts_nobody(tmp_path: Path, faulty_rank: int) -> None:
    outcomes, other = run_ranks(fail_reading_everywhere, 2, tmp_path, faulty_rank)
    assert outcomes == other
    assert outcomes[-1] == 2
    assert 1 in outcomes, "no fault met the verification"
    errors = [error for error in outcomes if isinstance(error, str)]
    assert errors, "no fault met the loading"
    assert all("Input/output error" in error and "\n" not in error for error in errors)


def save_beside_a_dying_rank(folder: Path) -> None:
    for step in (1, 2):
        save(folder, step)
    if dist.get_rank() == 1:
        watch(folder, lambda operation, path: os.kill(os.getpid(), signal.SIGKILL))
    save(folder, 3)


def test_a_rank_that_is_killed_neither_hangs_the_others_nor_commits(tmp_path: Path) -> None:
    with pytest.raises(RankError) as error:
        run_ranks(save_beside_a_dying_rank, 2, tmp_path)
    survivor, killed = error.value.outcomes
    assert "died" in killed
    assert "Traceback" in survivor
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000001", "step-00000002"]


def save_in_folders_of_their_own(root: Path) -> str:
    with pytest.raises(ConfigError) as error:
        save(root / str(dist.get_rank()), 1)
    assert not uncommitted(root / str(dist.get_rank()))
    return str(error.value)


def test_a_folder_that_nodes_do_not_share_is_refused(tmp_path: Path) -> None:
    messages = run_ranks(save_in_folders_of_their_own, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "all nodes share" in messages[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, timeout=30).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=30)


# Bytes of float32 left to the second save: nothing, a part of the tensor, and all but the small files.
@pytest.mark.parametrize("elements", [440_000, 300_000, 255_000])
def test_full_disk(small_disk: Path, elements: int, caplog: pytest.LogCaptureFixture) -> None:
    folder = small_disk / "checkpoints"
    save(folder, 1, elements=440_000 if elements == 440_000 else 260_000)
    with pytest.raises(ConfigError) as error:
        save(folder, 2, elements=elements)
    message = str(error.value)
    assert "\n" not in message
    assert f"no space for the checkpoint of step 2 in {folder}: it takes about" in message
    assert "are free" in message
    assert "checkpoint.keep" in message
    assert [entry.name for entry in folder.iterdir()] == ["step-00000001"]
    committed = checkpointer(folder).latest()
    assert committed is not None
    assert committed.step == 1
    assert not warnings_in(caplog)


def test_full_disk_without_a_mount(tmp_path: Path) -> None:
    [outcomes] = run_ranks(fail_everywhere, 1, tmp_path, 0, errno.ENOSPC)
    errors = [error for error, _ in outcomes if error is not None]
    assert len(errors) >= 15
    assert all("no space for the checkpoint of step 3" in error for error in errors)


def test_leftovers_that_cannot_be_pruned_do_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, keep=1)

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        save(tmp_path, 2, keep=1)
    assert warnings_in(caplog) == [f"checkpoint of step 1 in {tmp_path} cannot be deleted: Permission denied"]
    assert uncommitted(tmp_path) == [".step-00000001.removed"]
    assert latest_step(tmp_path) == 2
    checkpointer(tmp_path).sweep()
    assert not uncommitted(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(ConfigError, match=r"step 1 cannot be written: .*checkpoints") as error:
        save(tmp_path / "checkpoints", 1)
    assert "\n" not in str(error.value)
