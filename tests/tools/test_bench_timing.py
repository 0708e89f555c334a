"""Turns, and what is made of them: medians and spread by hand, ratios within a round, limits, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from models.errors import ConfigError
from tools.benching import model
from tools.benching.contenders import Contender, Family, Role
from tools.benching.machine import copy_bandwidth, disk_speed, read_speed, size_of
from tools.benching.model import Turn
from tools.benching.report import Report, Row, Table
from tools.benching.timing import Spread, alternate

CPU = torch.device("cpu")


class Recorder:
    """Steps that note whose they are and pass a given time on a clock of the test's own; a tenth of it waiting."""

    def __init__(self, name: str, seconds: float, calls: list[str], clock: list[float]) -> None:
        self.name, self.seconds, self.calls, self.clock = name, seconds, calls, clock
        self.waited = 0.0

    def step(self) -> None:
        self.calls.append(self.name)
        self.clock[0] += self.seconds
        self.waited += self.seconds / 10

    def close(self) -> None: ...


def contender(name: str, role: Role = "own", *, variant: str = "fp32", family: Family = "") -> Contender:
    return Contender(name, variant, 10, 1000, 100, Recorder(name, 0, [], [0]), role, family)


def test_turns_go_forth_and_back_after_a_round_that_does_not_count() -> None:
    calls: list[tuple[int, bool]] = []
    found = alternate(["a", "b"], lambda place, warming: calls.append((place, warming)) or len(calls), 3)
    assert calls == [(0, True), (1, True), (1, False), (0, False), (0, False), (1, False), (1, False), (0, False)]
    assert found == [[4, 5, 8], [3, 6, 7]]


def test_contenders_take_turns_and_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], list[str]()
    monkeypatch.setattr("tools.benching.model.time.perf_counter", lambda: clock[0])
    contenders = [
        Contender("a", "fp32", 1, 1, 100, Recorder("a", 2.0, calls, clock), "own"),
        Contender("b", "fp32", 1, 1, 50, Recorder("b", 0.5, calls, clock), "own"),
    ]
    turns = model.measure(contenders, rounds=2, steps=2, device=CPU)
    assert "".join(calls) == "aaabbb" + "bbbaaa" + "aaabbb"  # warm-up, then one settling and two timed steps a turn
    np.testing.assert_allclose(model.rates(contenders, turns, 2), [[50.0] * 2, [100.0] * 2])
    np.testing.assert_allclose([turn.waited / turn.seconds for own in turns for turn in own], 0.1)


def test_a_compilation_in_a_timed_round_is_told() -> None:
    class Growing(Recorder):
        def step(self) -> None:
            super().step()
            self.function(torch.ones(len(self.calls)))

        @torch.compile(backend="eager", dynamic=False)
        def function(x: torch.Tensor) -> torch.Tensor:  # type: ignore[misc]
            return x + 1

        function = staticmethod(function)

    torch._dynamo.reset()
    contenders = [Contender("grows", "fp32", 1, 1, 1, Growing("a", 0.0, [], [0.0]), "own"), contender("stays")]
    turns = model.measure(contenders, rounds=1, steps=2, device=CPU)
    assert [turn.compiled for own in turns for turn in own] == [2, 0]
    (line,) = model.remarks(contenders, turns, 2, "bf16", CPU)
    assert line == "warning: fp32 grows compiled 2 graphs in timed rounds, which are slower for it"


def test_the_spread_is_of_linear_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 10.0]) == (1.0, 1.75, 3.0, 5.5, 10.0)


def test_ratios_are_taken_round_by_round() -> None:
    contenders = [contender("nanogpt", "reference", family="gpt"), contender("mine")]
    rates = [[100.0, 10.0, 50.0], [150.0, 20.0, 50.0]]
    (row,) = model.ratio_table(contenders, rates).rows
    assert (row.name, list(row.values)) == ("fp32 mine / nanogpt", [1.5, 2.0, 1.0])  # of the medians it would be 1
    turns = [[Turn(100 / r, 0.0, 0) for r in own] for own in rates]
    (shipped,) = model.remarks(contenders, turns, 1, "fp32", CPU)
    assert shipped == "mine as it says (fp32) to nanogpt as it runs on cpu (fp32): 1.500 (1.000 to 2.000)"
    assert model.remarks(contenders, turns, 1, "bf16", CPU) == []


def test_who_is_held_against_whom() -> None:
    contenders = [
        contender("nanogpt", "reference", family="gpt"),
        contender("our gpt", "twin", family="gpt"),
        contender("hf", "reference", family="llama"),
        contender("llama"),
        contender("dnt"),
        contender("dyt"),
        contender("llama", variant="bf16"),
    ]
    found = [(contenders[i].name, contenders[j].name) for i, j in model.pairs(contenders)]
    assert found == [
        ("our gpt", "nanogpt"),
        *(("llama", other) for other in ("nanogpt", "hf")),
        *(("dnt", other) for other in ("nanogpt", "hf", "llama")),
        *(("dyt", other) for other in ("nanogpt", "hf", "llama")),
    ]


def test_mfu_is_of_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 tokens in 2 s at 1,000 operations each are 1e5 a second, of 4e5 that products reach."""
    monkeypatch.setattr(model, "matmul_rate", lambda device, compute: 4e5)
    speeds = model.speed_table([contender("mine")], [[Turn(2.0, 0.01, 0)]], 2, CPU)
    head, (line,) = speeds.cells()
    assert dict(zip(head, line, strict=True)) == {
        "": "fp32 mine",
        "tokens/s": "100.0",
        "limit": "400.0",
        "MFU": "25.0 %",
        "parameters": "10",
        "loading": "0.50 %",
        "recompiled": "0",
    }


def table() -> Table:
    rows = [Row("one", [1.0, 3.0, 2.0], 0.5, {"GB": 1.5}), Row("none", [], why="no such | disk")]
    return Table("Saving", "s", rows, is_cost=True)


def test_a_cost_s_share_of_the_limit_is_the_other_way_round() -> None:
    head, lines = table().cells()
    assert head == ["", "s", "quartiles", "least to most", "limit", "of the limit", "GB", "remark"]
    assert lines[0] == ["one", "2.000", "1.500 to 2.500", "1.000 to 3.000", "0.5000", "25.0 %", "1.500", ""]
    assert lines[1] == ["none", "–", "–", "–", "–", "–", "–", "no such | disk"]


def test_a_report_is_text_and_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"command": ["python", "-m", "x"], "packages": {"torch": "2", "litgpt": None}, "device": "a box"}
    report = Report("checkpoint of a", environment, {"rounds": 3}, [table()], ["a note"])
    report.give(tmp_path / "out")
    out = capsys.readouterr().out
    assert "checkpoint of a: rounds 3" in out
    assert out.rstrip().endswith("a note")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["tables"][0]["rows"][0]["values"] == [1.0, 3.0, 2.0]
    assert written["environment"]["command"] == ["python", "-m", "x"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| one | 2.000 |" in text
    assert "no such \\| disk" in text
    assert "`python -m x`" in text
    assert "torch 2" in text
    assert "litgpt" not in text
    picture = (tmp_path / "out" / "picture.svg").read_text()
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    report.write(tmp_path / "out")
    assert (tmp_path / "out" / "picture.svg").read_text() == picture  # the same figure is the same file
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to --output"):
        report.write(tmp_path / "file" / "out")


def test_the_machine_is_measured(tmp_path: Path) -> None:
    """No copy is slower than 10 MB/s or faster than 10 TB/s; a file is gone after its measurement."""
    assert 1e7 < copy_bandwidth(CPU, 1 << 20, seconds=0.01) < 1e13
    speed = disk_speed(tmp_path, 3_000_001)
    assert 0 < speed.write < 1e13
    assert 0 < speed.read < 1e13
    assert not list(tmp_path.iterdir())
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(1000))
    assert size_of(tmp_path) == 2000
    assert read_speed(tmp_path / "a", most=10) > 0
