"""A study's grid, its verdict, and its resumption: finished cells stay as they are, and stale ones are not believed."""

from __future__ import annotations

import json
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.counts import derive_counts
from tests.runs import TINY
from tools import study
from tools.command import run
from tools.study import Cell, Result, best, cells, read_study, table

STUDIES = Path(__file__).parents[2] / "configs" / "studies"


def small(**changes: Any) -> dict[str, Any]:
    """Two arms, one with two tuned values, under two seeds: six cells."""
    tree = {key: value for key, value in TINY.items() if key != "name"}
    tree["train"] = {"steps": 3, "batch_tokens": 64}
    tree["schedule"] = {"warmup_steps": 0}
    return {
        "name": "small",
        "run": tree,
        "factors": {
            "plan": {"dnt": {"model": {"plan": "dnt"}}, "llama": {"model": {"plan": "llama"}}},
            "rate": {
                "tuned": {"tune": {"optimizer.lr": [0.01, 0.1]}},
                "fixed": {"optimizer": {"lr": 0.2}},
            },
        },
        "seeds": [0, 1],
    } | changes


def write(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_that_ships_expands_to_runs(path: Path) -> None:
    """``cells`` builds every configuration; that its batch divides shows here, before the first hour of a study."""
    tree = read_study(path)
    grid = list(cells(tree))
    assert len({cell.name for cell in grid}) == len(grid) > 0
    for cell in grid:
        config = study.build(cell.tree, cell.name)
        for world_size in (1, 2):
            assert config.schedule.warmup_steps < derive_counts(config, world_size).steps
    # The same care for every arm: equally many tuned values and seeds.
    arms = {cell.arm for cell in grid}
    assert len({sum(cell.arm == arm for cell in grid) for arm in arms}) == 1


def test_there_are_studies() -> None:
    assert (STUDIES / "tiny.yaml").exists()


def test_the_grid_is_every_choice_with_every_value_and_seed() -> None:
    grid = {cell.name: cell for cell in cells(small())}
    assert list(grid) == [
        f"{plan}-{rate}-seed{seed}"
        for plan in ("dnt", "llama")
        for rate in ("tuned-lr0.01", "tuned-lr0.1", "fixed")
        for seed in (0, 1)
    ]
    one = grid["llama-tuned-lr0.01-seed1"]
    assert (one.arm, one.tuned, one.seed) == (("llama", "tuned"), (("optimizer.lr", 0.01),), 1)
    config = study.build(one.tree, "here")
    assert (config.model.plan, config.optimizer.lr, config.seed) == ("llama", 0.01, 1)
    assert config.model.width == TINY["model"]["width"], "what all share"
    assert study.build(grid["dnt-fixed-seed0"].tree, "here").optimizer.lr == 0.2
    assert [cell.seed for cell in cells(small(seeds=[7]))] == [7] * 6


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=3))
def test_no_two_cells_share_a_folder(rates: list[float], seeds: list[int]) -> None:
    """Names carry six digits: values that differ in the seventh, like a value given twice, are refused."""
    tree = small(factors={"rate": {"tuned": {"tune": {"optimizer.lr": rates}}}}, seeds=seeds)
    if len({f"{rate:g}" for rate in rates}) == len(rates) and len(set(seeds)) == len(seeds):
        assert len({cell.name for cell in cells(tree)}) == len(rates) * len(seeds)
    else:
        with pytest.raises(ConfigError, match="two cells are called tuned-lr"):
            list(cells(tree))


def result(arm: str, rate: float, seed: int, loss: float | None) -> Result:
    cell = Cell((arm,), (("optimizer.lr", rate),), seed, {})
    return Result(cell, loss, None if loss is None else loss / 2)


RESULTS = [
    # Seed 0 alone would choose 0.1, the mean chooses 0.2; 0.3 has the lowest loss and a seed that diverged.
    *(result("a", 0.1, 0, 2.0), result("a", 0.1, 1, 4.0)),
    *(result("a", 0.2, 0, 2.5), result("a", 0.2, 1, 2.7)),
    *(result("a", 0.3, 0, 1.0), result("a", 0.3, 1, None)),
    result("b", 0.1, 0, None),
    *(result("c", 0.2, 0, 3.0), result("c", 0.1, 0, 3.5)),
]


def test_the_best_has_the_lowest_mean_over_the_seeds() -> None:
    chosen = best(RESULTS)
    assert chosen[("a",)] == ((("optimizer.lr", 0.2),), pytest.approx(2.6))
    assert ("b",) not in chosen, "an arm that only diverged has no best"
    assert chosen[("c",)] == ((("optimizer.lr", 0.2),), 3.0)
    assert best([result("a", 0.1, 0, inf)]) == {}


def test_the_table_marks_the_best_and_the_diverged() -> None:
    lines = table({"factors": {"arm": {}}}, RESULTS).splitlines()
    assert lines[0] == "| arm | tuned | seed | validation loss | bits per byte |  |"
    assert {line.count("|") for line in lines} == {7}, "as many cells in every row"
    assert lines[3] == "| a | optimizer.lr 0.1 | 1 | 4.0000 | 2.0000 |  |"
    assert lines[5] == "| a | optimizer.lr 0.2 | 1 | 2.7000 | 1.3500 | best |"
    assert lines[7] == "| a | optimizer.lr 0.3 | 1 | diverged |  |  |"
    assert [line for line in lines if line.endswith("| best |")] == [lines[4], lines[5], lines[9]]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["study", *map(str, arguments)])
    run(study.main)


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line, which a progress bar may stand before, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, *arguments)
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (2, "")
    lines = said.err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in said.err
    return lines[-1]


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*-seed0/**/*") if path.is_file()}


def test_a_study_runs_and_resumes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One arm learns, one diverges at its larger rate. A second call runs only what is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    tree = small(seeds=[0], factors={"rate": {"tuned": {"tune": {"optimizer.lr": [0.1, 1e30]}}}})
    tree["run"]["data"] = {"sequence_length": 32, "path": str(corpus)}
    tree["run"]["train"] |= {"clip": None}
    path = write(tmp_path, tree)
    call(monkeypatch, path)
    printed = capsys.readouterr().out
    folder = tmp_path / "runs/small"
    assert printed == (folder / "table.md").read_text()
    learned, diverged = printed.splitlines()[2:]
    assert learned.startswith("| tuned | optimizer.lr 0.1 | 0 | ")
    assert learned.endswith(" best |")
    assert diverged == "| tuned | optimizer.lr 1e+30 | 0 | diverged |  |  |"
    (verdict,) = json.loads((folder / "best.json").read_text())
    assert (verdict["arm"], verdict["tuned"]) == (["tuned"], {"optimizer.lr": 0.1})
    assert f"{verdict['loss']:.4f}" in learned
    assert read_study(folder / "study.yaml") == tree

    before = stamps(folder)
    assert len(before) > 5
    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: pytest.fail("a finished cell is run again"))
    call(monkeypatch, path)
    assert capsys.readouterr().out == printed
    assert stamps(folder) == before

    # A study that was changed under its old name: what lies there answers another question.
    tree["run"]["train"]["steps"] = 4
    line = fails(monkeypatch, capsys, write(tmp_path, tree))
    assert "tuned-lr0.1-seed0 was run with another configuration" in line
    assert stamps(folder) == before


def test_a_cell_that_fails_is_named_and_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, small(seeds=[0]))

    class Stopped:
        returncode = 75

    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: Stopped())
    line = fails(monkeypatch, capsys, path, "--workers", "1")
    assert "dnt-tuned-lr0.01-seed0 ended with exit code 75; see runs/small/dnt-tuned-lr0.01-seed0.log" in line
    assert not list((tmp_path / "runs/small").glob("*.exit"))


def test_a_run_without_validation_has_no_place_in_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    class Finished:
        returncode = 0

    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: Finished())
    assert "has no validation loss" in fails(monkeypatch, capsys, write(tmp_path, small(seeds=[0])), "--workers", "1")


LLAMA = {"model": {"plan": "llama"}}
MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"factor": {}}, ["'factor'", "did you mean 'factors'?"]),
    ({"run": {"modle": {}}}, ["cell ", "'modle'", "model"]),
    ({"run": 3}, ["run is 3", "dictionary"]),
    ({"factors": {}}, ["factors is {}", "at least 1"]),
    ({"factors": {"plan": {}}}, ["factors.plan is {}"]),
    ({"factors": {"plan": ["llama"]}}, ["factors.plan is ['llama']", "dictionary"]),
    ({"factors": {"plan": {"llama": None}}}, ["factors.plan.llama is None"]),
    ({"factors": {"depth": {2: LLAMA}}}, ["factors.depth.2", "string"]),
    ({"factors": {"plan": {"llama": {"model": {"plan": "lama"}}}}}, ["'lama'", "'llama'"]),
    ({"factors": {"plan": {"llama": {"tune": {"optimizer.lrr": [0.1]}}}}}, ["'optimizer.lrr'", "'optimizer.lr'"]),
    ({"factors": {"plan": {"llama": {"tune": {"optimizer.lr": 0.1}}}}}, ["tune.optimizer.lr is 0.1", "list"]),
    ({"factors": {"plan": {"llama": {"tune": {"optimizer.lr": []}}}}}, ["tune.optimizer.lr is []"]),
    ({"factors": {"plan": {"llama": {"tune": {"optimizer.name": ["adamw"]}}}}}, ["tune.optimizer.name.0", "'adamw'"]),
    ({"seeds": []}, ["seeds is []"]),
    ({"factors": {"batch": {"odd": {"train": {"batch_tokens": 33}}}}}, ["train.batch_tokens 33", "write 32"]),
    ({"seeds": [0, 0]}, ["two cells are called"]),
    ({"factors": {"a": {"x-y": LLAMA, "x": LLAMA}, "b": {"z": LLAMA, "y-z": LLAMA}}}, ["two cells are called x-y-z"]),
]


@pytest.mark.parametrize(("changes", "names"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    names: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails(monkeypatch, capsys, write(tmp_path, small(**changes)))
    for name in names:
        assert name in line
    assert not (tmp_path / "runs").exists()


def test_missing_parts_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for key in ("name", "run", "factors"):
        tree = small()
        del tree[key]
        assert f"{key} is missing" in fails(monkeypatch, capsys, write(tmp_path, tree))
    assert "no configuration file" in fails(monkeypatch, capsys, tmp_path / "nowhere.yaml")
    assert "--workers is 0" in fails(monkeypatch, capsys, write(tmp_path, small()), "--workers", "0")
