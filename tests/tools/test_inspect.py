"""``python -m tools.inspect`` on real runs: its files, runs side by side, and mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import LogConfig
from tests.tools import calling
from tests.tools.small_run import prepare_small, small_config, train_small
from tools import inspect
from tools.inspecting.sections import SECTIONS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inspect")
    config = small_config(folder, prepare_small(folder))
    runs = {}
    for plan in ("llama", "dyt"):
        log = LogConfig(every=1, inspect_every=2, tensorboard=False)
        train_small(replace(config, name=plan, model=replace(config.model, plan=plan), log=log))
        runs[plan] = folder / "runs" / plan
    return runs


call = partial(calling.call, inspect.main)


def test_two_runs_side_by_side(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    call(monkeypatch, *trained.values(), "--sequences", "3", "--output", output)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"report: {output / 'report.html'}"
    results: list[dict[str, Any]] = json.loads((output / "results.json").read_text())
    assert [one["plan"] for one in results] == ["llama", "dyt"]
    for one in results:
        assert set(SECTIONS) <= set(one)
    text, page = (output / "report.md").read_text(), (output / "report.html").read_text()
    figures = {path.name for path in (output / "figures").iterdir()}
    assert figures
    for name in figures:
        assert f"figures/{name}" in text
        assert f"figures/{name}" not in page, "the page has its figures in it"
    assert page.count("<svg") == len(figures)


def test_only_what_is_asked_for(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the run's other files, which stay as they are."""
    run_folder = trained["llama"]
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.is_file()}
    call(monkeypatch, run_folder, "--only", "spectra", "--sequences", "2")
    (one,) = json.loads((run_folder / "inspect/results.json").read_text())
    assert set(one) & set(SECTIONS) == {"spectra"}
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "spektra"], "did you mean 'spectra'"),
        (["--sequences", "0"], "--sequences is 0"),
        (["--step", "99999"], "99999"),
    ],
)
def test_mistakes(
    options: list[str],
    said: str,
    trained: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, trained["llama"], *options)
    assert left.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_what_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, tmp_path)
    assert left.value.code == 2
    assert "is not a run's folder" in capsys.readouterr().err
