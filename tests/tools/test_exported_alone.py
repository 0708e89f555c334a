"""Exported folders where nothing is installed but torch, transformers and what these require."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tools.exported_alone import PLANS, broken, main, make, use

ALONE = ("torch", "transformers")


def required(*names: str) -> list[Distribution]:
    """These distributions and all that they require, directly or not."""
    wanted, found = list(names), dict[str, Distribution]()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name not in found:
            found[name] = distribution(name)
            asked = map(Requirement, found[name].requires or [])
            wanted += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    return list(found.values())


def interpreter(folder: Path, *names: str) -> tuple[list[str], str]:
    """(the command, its PYTHONPATH): Python with the standard library, and links to what these distributions need."""
    folder.mkdir()
    for installed in required(*names):
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():  # several distributions may share one package
                link.symlink_to(str(installed.locate_file(top)))
    return [sys.executable, "-S"], str(folder)


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("exported")
    return [make(place / plan, plan, corpus) for plan in PLANS]


@pytest.mark.parametrize("more", [(), ("accelerate",)], ids=["generates", "trains"])
def test_the_folder_needs_nothing_else(more: tuple[str, ...], folders: list[Path], tmp_path: Path) -> None:
    if more:
        pytest.importorskip("accelerate")  # transformers' Trainer refuses to start without
    python, path = interpreter(tmp_path / "packages", *ALONE, *more)
    found = use(folders, python, PYTHONPATH=path)
    assert found.keys() == set(PLANS)
    assert not [line for folder in folders for line in broken(folder, found[folder.name], trained=bool(more))]


def test_nothing_else_is_there(tmp_path: Path) -> None:
    """Of what is installed here; so that what imports more fails above."""
    python, path = interpreter(tmp_path / "packages", *ALONE)
    here = {"models", "pretrain", "tools", "launch", "tests", "accelerate", "sentencepiece", "datasets", "pytest"}
    asked = sorted({*here, *ALONE})
    assert all(map(find_spec, asked))
    code = "import sys; from importlib.util import find_spec; print(*[n for n in sys.argv[1:] if find_spec(n)])"
    seen = subprocess.run(
        [*python, "-c", code, *asked],
        cwd=tmp_path,
        env={"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert set(seen.stdout.split()) == set(ALONE)


@pytest.mark.survey
@pytest.mark.timeout(1800)
def test_in_a_fresh_virtual_environment(capfd: pytest.CaptureFixture[str]) -> None:
    """Downloads torch and transformers, or takes them from pip's cache."""
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0, capfd.readouterr().err
