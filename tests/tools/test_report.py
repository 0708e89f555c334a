"""The picture of the loss curves: it is written, it shows what was logged, and mistakes are one line."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from tests.tools import calling
from tools import report

matplotlib.use("agg")


def make_run(folder: Path, losses: list[float], last: float = 3.0) -> Path:
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = [
        {"step": i + 1, "tokens": 100 * (i + 1), "loss": loss} for i, loss in enumerate(losses)
    ]
    records[-1] |= {"val_loss": last, "val_bits_per_byte": last / 2}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


call = partial(calling.call, report.main)
fails = partial(calling.fails, report.main)


def pixels(path: Path) -> Any:
    return matplotlib.image.imread(path)


def test_one_run_beside_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "one", [5.0, 4.0, 3.5])
    call(monkeypatch, folder)
    assert capsys.readouterr().out == f"loss curve: {folder / 'loss.png'}\n"
    image = pixels(folder / "loss.png")
    assert min(image.shape[:2]) > 500
    assert image.min() < 0.5 < image.max(), "something is drawn"


def test_what_is_drawn_is_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has one color, in which its training, its validation and its name with bits per byte stand."""
    from matplotlib import pyplot as plt

    curves: list[tuple[str, list[list[float]]]] = []
    named: dict[str, str] = {}

    def look(figure: Any, path: Path, **options: Any) -> None:
        curves[:] = [(line.get_color(), line.get_xydata().tolist()) for line in figure.axes[0].get_lines()]
        (legend,) = figure.legends or [figure.axes[0].get_legend()]
        named.clear()
        for handle, text in zip(legend.get_lines(), legend.get_texts(), strict=True):
            named[text.get_text()] = handle.get_color()

    monkeypatch.setattr(plt.Figure, "savefig", look)
    one = make_run(tmp_path / "one", [5.0, 4.0])
    with (one / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tokens": 300, "loss": null}\n{"step": 4, "tokens": 400, "lo')  # a gap, and a torn line
    call(monkeypatch, one, make_run(tmp_path / "two", [6.0], last=2.0))
    expected = [("C0", [[100, 5.0], [200, 4.0]]), ("C0", [[200, 3.0]]), ("C1", [[100, 6.0]]), ("C1", [[100, 2.0]])]
    assert sorted(curves) == sorted(expected)
    for name, color, bits in (("one", "C0", "1.500"), ("two", "C1", "1.000")):
        (label,) = (text for text in named if text.startswith(name) and bits in text)
        assert named[label] == color

    same = make_run(tmp_path / "other" / "one", [7.0])
    call(monkeypatch, one, same)
    for path in (one, same):
        assert any(text.startswith(str(path)) for text in named), "two runs of one name are told apart by their paths"


def test_several_runs_into_a_file_of_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / f"run{i}", [5.0, 4.0 - i]) for i in range(3)]
    call(monkeypatch, *runs, "--output", tmp_path / "curves.png")
    alone = tmp_path / "alone.png"
    call(monkeypatch, runs[0], "--output", alone)
    assert pixels(tmp_path / "curves.png").shape == pixels(alone).shape
    assert (pixels(tmp_path / "curves.png") != pixels(alone)).any()


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_run(tmp_path / "good", [5.0])
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").touch()
    assert "missing" in fails(monkeypatch, capsys, good, tmp_path / "missing")
    assert "begun" in fails(monkeypatch, capsys, tmp_path / "begun")
    assert "nowhere" in fails(monkeypatch, capsys, good, "--output", tmp_path / "nowhere" / "x.png")
    assert "is not supported" in fails(monkeypatch, capsys, good, "--output", tmp_path / "curves.doc")
    (good / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert "line 2" in fails(monkeypatch, capsys, good)


def test_a_missing_matplotlib_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "one", [5.0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in fails(monkeypatch, capsys, folder)
