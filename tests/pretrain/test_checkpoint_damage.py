"""Committed checkpoints that rot: refused with one clear line, and the one before is used."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.checkpoint import Checkpointer
from tests.ranks import run_ranks

NAMES = [".metadata", "__0_0.distcp", "extras.json", "manifest.json", "rank-00000.pt"]


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        tensors = {"model": {"weight": torch.full((7,), float(step))}}
        Checkpointer(folder, keep=9, keep_every=None).save(step, tensors, {"step": step}, {"draws": step})


def latest(folder: Path) -> int | None:
    committed = Checkpointer(folder, keep=9, keep_every=None).latest()
    return None if committed is None else committed.step


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save(folder, 10, 20)
    return folder


@pytest.fixture
def damaged(two: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(two, tmp_path / "checkpoints"))


def newest(folder: Path) -> Path:
    return folder / "step-00000020"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_the_files_are_as_expected(two: Path) -> None:
    assert sorted(path.name for path in newest(two).iterdir()) == NAMES
    assert latest(two) == 20


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: flip(path, 8 * (path.stat().st_size // 2)), "does not match|is not a manifest"),
        (truncate, "bytes were written|bytes, .* were written|does not match|is not a manifest"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "were written|is not a manifest"),
        (Path.unlink, "is missing"),
    ],
    ids=["flipped", "truncated", "longer", "missing"],
)
def test_damage_is_reported_and_the_one_before_is_used(
    damaged: Path, name: str, damage: Callable[[Path], None], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(newest(damaged) / name)
    assert latest(damaged) == 10
    [line] = [record.getMessage() for record in caplog.records if record.name.startswith("pretrain")]
    assert line.startswith(f"checkpoint {newest(damaged)} is damaged: {name} ")
    assert line.endswith("; trying the one before")
    assert "\n" not in line
    assert re.search(problem, line)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_goes_unseen(two: Path, data: st.DataObject) -> None:
    path = newest(two) / data.draw(st.sampled_from(NAMES))
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    flip(path, bit)
    try:
        assert latest(two) == 10
    finally:
        flip(path, bit)
    assert latest(two) == 20


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "7", '"sha256"', '{"sha256": 1}', "\udc80", "{" * 5])
def test_garbage_for_a_manifest(damaged: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (newest(damaged) / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert latest(damaged) == 10
    assert "manifest.json" in caplog.text


def test_a_renamed_checkpoint_is_not_another_step(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest(damaged).rename(damaged / "step-00000030")
    assert latest(damaged) == 10
    assert "its manifest is of step 20" in caplog.text


def test_other_entries_are_ignored(damaged: Path) -> None:
    (damaged / "step-00000099.bak").mkdir()
    (damaged / ".step-00000098.partial").mkdir()
    shutil.copytree(newest(damaged), damaged / ".step-00000097.removed")
    (damaged / "notes").write_text("hello")
    assert latest(damaged) == 20
    Checkpointer(damaged, keep=1, keep_every=None).sweep()
    names = sorted(path.name for path in damaged.iterdir())
    assert names == ["notes", "step-00000010", "step-00000020", "step-00000099.bak"]


def test_nothing_committed_is_none_but_nothing_whole_is_an_error(damaged: Path, tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    for step in ("step-00000010", "step-00000020"):
        truncate(damaged / step / "extras.json")
    with pytest.raises(ConfigError, match=r"none of the 2 checkpoints in .* is whole") as error:
        latest(damaged)
    assert "\n" not in str(error.value)


def test_a_damaged_step_is_written_again_and_a_whole_one_is_kept(damaged: Path) -> None:
    before = (newest(damaged) / "manifest.json").stat().st_mtime_ns
    save(damaged, 20)
    assert (newest(damaged) / "manifest.json").stat().st_mtime_ns == before
    truncate(newest(damaged) / "__0_0.distcp")
    save(damaged, 20)
    assert latest(damaged) == 20
    assert not list(damaged.glob(".*"))


def test_a_damaged_later_step_does_not_push_a_whole_one_out(damaged: Path) -> None:
    truncate(newest(damaged) / "__0_0.distcp")
    tensors = {"model": {"weight": torch.zeros(7)}}
    Checkpointer(damaged, keep=2, keep_every=None).save(15, tensors, {}, {})
    assert sorted(path.name for path in damaged.iterdir()) == ["step-00000010", "step-00000015", "step-00000020"]


def latest_on_ranks(folder: Path) -> int | str:
    checkpointer = Checkpointer(folder, keep=2, keep_every=None, group=dist.group.WORLD)
    try:
        committed = checkpointer.latest()
    except ConfigError as error:
        return str(error)
    assert committed is not None
    return committed.step


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_agree_whoever_finds_the_damage(damaged: Path, name: str) -> None:
    truncate(newest(damaged) / "extras.json")
    flip(newest(damaged) / name, 0)
    assert run_ranks(latest_on_ranks, 3, damaged) == [10, 10, 10]
