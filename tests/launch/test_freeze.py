"""What is submitted is what runs: the copy of the code and the configuration, whatever becomes of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from launch import freeze as module
from launch.freeze import freeze, main
from models.errors import ConfigError
from pretrain import run as run_module
from pretrain.cli import load
from pretrain.run import revision
from tests.ranks import fork_server
from tests.runs import REPOSITORY, write_config

SUFFIXES = (".py", ".sh", ".sbatch", ".env")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small one to change, from which freeze copies instead of from this one."""
    home = tmp_path / "checkout"
    for name in ("models/norms.py", "pretrain/data/a.py", "tools/b.py", "launch/freeze.py", "launch/train.sbatch"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f"# {name}\n")
    monkeypatch.setattr(module, "__file__", str(home / "launch/freeze.py"))
    return home


def test_everything_that_runs_is_copied(tmp_path: Path) -> None:
    frozen = freeze(tmp_path / "run", "a: 1\n")
    assert frozen.parent == tmp_path / "run/frozen"
    found = content(frozen)
    expected = {
        f"code/{path.relative_to(REPOSITORY)}": path.read_bytes()
        for room in ("models", "pretrain", "tools", "launch")
        for path in (REPOSITORY / room).rglob("*")
        if path.suffix in SUFFIXES
    }
    assert {"code/pretrain/trainer.py", "code/launch/train.sbatch", "code/launch/environment.sh"} <= set(expected)
    made = {name: found.pop(name) for name in ("config.yaml", "code/revision.json")}
    assert found == expected
    assert made["config.yaml"] == b"a: 1\n"
    assert os.stat(frozen).st_mode & 0o777 == 0o755, "other users of the cluster may look"


def test_the_revision_is_the_checkout_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = freeze(tmp_path / "run", "a: 1\n")
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    expected = {
        "git_revision": head.stdout.strip() if head.returncode == 0 else None,
        "git_changes": bool(changed.stdout.strip()),
    }
    assert json.loads((frozen / "code/revision.json").read_text()) == expected
    # Which is what the frozen code says of itself, wherever it lies.
    monkeypatch.setattr(run_module, "_git", lambda *arguments: pytest.fail("it is no checkout"))
    monkeypatch.setattr(run_module, "__file__", str(frozen / "code/pretrain/run.py"))
    assert revision() == expected


def test_the_same_is_one_copy_and_anything_else_another(tmp_path: Path, checkout: Path) -> None:
    run = tmp_path / "run"
    first = freeze(run, "a: 1\n")
    before = content(first)
    assert freeze(run, "a: 1\n") == first
    others = [freeze(run, "a: 2\n"), freeze(run, None)]
    changed = checkout / "models/norms.py"
    changed.write_text("# changed\n")
    others.append(freeze(run, "a: 1\n"))
    assert (others[-1] / "code/models/norms.py").read_text() == "# changed\n"
    (checkout / "tools/c.py").write_text("")
    others.append(freeze(run, "a: 1\n"))
    (checkout / "tools/c.py").rename(checkout / "tools/d.py")
    others.append(freeze(run, "a: 1\n"))
    assert len({first, *others}) == 1 + len(others)
    assert content(first) == before, "a copy is never written again"
    (checkout / "models/notes.txt").write_text("not code")
    (checkout / "tests").mkdir()
    (checkout / "tests/test_a.py").write_text("not code that a job runs")
    assert freeze(run, "a: 1\n") == others[-1]


def test_what_moves_between_files_is_a_change(tmp_path: Path, checkout: Path) -> None:
    """A hash of all contents in a row would not see it."""
    one, other = checkout / "models/a.py", checkout / "models/b.py"
    one.write_text("ab")
    other.write_text("c")
    first = freeze(tmp_path / "run", None)
    one.write_text("a")
    other.write_text("bc")
    assert freeze(tmp_path / "run", None) != first


def _freeze(run: Path, barrier: Barrier, line: Any) -> None:
    found = []
    for i in range(5):
        barrier.wait(60)
        found.append(freeze(run, f"a: {i}\n"))
        assert (found[-1] / "code/launch/train.sbatch").exists(), "whole as soon as it has its name"
    line.send(found)


def test_all_elements_of_an_array_at_once(tmp_path: Path) -> None:
    context = fork_server()
    barrier = context.Barrier(4)
    pipes, processes = [], []
    try:
        for _ in range(4):
            here, there = context.Pipe(duplex=False)
            processes.append(context.Process(target=_freeze, args=(tmp_path / "run", barrier, there)))
            processes[-1].start()
            there.close()
            pipes.append(here)
        assert all(pipe.poll(60) for pipe in pipes)
        found = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert found == [found[0]] * 4
    assert sorted(found[0]) == sorted((tmp_path / "run/frozen").iterdir()), "no copy that nobody uses"
    sizes = {len(content(folder)) for folder in found[0]}
    assert len(sizes) == 1


def test_the_frozen_code_is_what_runs(tmp_path: Path) -> None:
    """Even from the checkout's folder, and where the checkout is installed."""
    frozen = freeze(tmp_path / "run", "a: 1\n")
    program = "import models, pretrain, tools, launch; print(*(m.__file__ for m in (models, pretrain, tools, launch)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(frozen / "code"), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == [
        str(frozen / "code" / room / "__init__.py") for room in ("models", "pretrain", "tools", "launch")
    ]


def test_a_configuration_has_every_key(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkout: Path
) -> None:
    """Also those of its bases, which may change, and of the command line."""
    write_config(tmp_path, corpus).rename(tmp_path / "base.yaml")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nseed: 5\n")
    given = [str(tmp_path / "top.yaml"), "--optimizer.lr", "0.3", "--name", "it's $HOME\n  too"]
    expected = load(tmp_path / "top.yaml", given[1:])
    assert expected.name == "it's $HOME too"
    before = content(tmp_path)
    assert main(["--dry-run", *given]) == 0
    planned = capsys.readouterr().out
    assert content(tmp_path) == before
    assert not (tmp_path / "runs").exists(), "a dry run leaves nothing"
    assert main(given) == 0
    assert capsys.readouterr().out == planned
    folder = planned.removesuffix("\n")
    assert Path(folder).parent == tmp_path / "runs/it's $HOME too/frozen"
    shutil.rmtree(checkout)
    (tmp_path / "base.yaml").unlink()
    assert load(Path(folder) / "config.yaml") == expected


def test_the_code_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], checkout: Path) -> None:
    """For a study, each of whose cells has a configuration of its own."""
    given = ["--code", str(tmp_path / "runs/grid")]
    assert main(["--dry-run", *given]) == 0
    assert not (tmp_path / "runs").exists()
    assert main(given) == 0
    planned, made = capsys.readouterr().out.splitlines()
    assert planned == made
    assert Path(made).parent == tmp_path / "runs/grid/frozen"
    assert [path.name for path in Path(made).iterdir()] == ["code"]


@pytest.mark.parametrize("arguments", [[], ["--name", "x"], ["--code"], ["--code", "runs/a", "--seed", "1"]])
def test_mistakes(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^freeze: .*write "):
        main(arguments)


def test_a_folder_that_cannot_be_written(tmp_path: Path, checkout: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match=r"cannot freeze the code under .*/run: .*Not a directory"):
        freeze(tmp_path / "run", "a: 1\n")


def test_a_disk_that_fills_up_leaves_no_half(tmp_path: Path, checkout: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "disk")]
    (tmp_path / "disk").mkdir()
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        (checkout / "tools/large.py").write_text("#" * 100_000)
        with pytest.raises(ConfigError, match="No space left"):
            freeze(tmp_path / "disk/run", "a: 1\n")
        assert list((tmp_path / "disk/run/frozen").iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)
