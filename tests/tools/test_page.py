"""A report's folder holds the report and nothing of the one before it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from models.errors import ConfigError
from tools.page import write_report

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><title>{}</title></svg>'


def text_of(*names: str) -> str:
    return "# Losses\n\n" + "".join(f"![Of {name}](figures/{name}.svg)\n\n" for name in names)


def write(folder: Path, *names: str) -> None:
    write_report(folder, "Losses", text_of(*names), {name: SVG.format(name) for name in names}, {"shown": names})


def test_a_report_is_all_there(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", "first", "second")
    folder = tmp_path / "new" / "folder"
    assert (folder / "report.md").read_text() == text_of("first", "second")
    assert json.loads((folder / "results.json").read_text()) == {"shown": ["first", "second"]}
    html = (folder / "report.html").read_text()
    assert [re.search(f"<title>{name}</title></svg>", html) is not None for name in ("first", "second")] == [True] * 2
    assert "figures/" not in html


def test_figures_of_an_earlier_report_go_and_others_stay(tmp_path: Path) -> None:
    write(tmp_path, "first", "second")
    mine = tmp_path / "figures" / "mine.svg"
    mine.write_text("<svg/>")
    write(tmp_path, "second")
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"mine.svg", "second.svg"}


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^cannot write the report to .*file/report: Not a directory$"):
        write(tmp_path / "file" / "report", "first")


def test_numbers_that_json_lacks_are_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, "Losses", "", {}, {"loss": float("nan")})
