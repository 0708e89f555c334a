"""The command on real runs: one table for normalized and DyT models, its intervals, its files, and mistakes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from models import ConfigError
from pretrain.data import open_source
from tests.tools import calling
from tests.tools.small_run import prepare_small, small_config, train_small
from tools import numerics, page
from tools.loading import load_run
from tools.quantizing.formats import Treatment
from tools.quantizing.losses import read_windows
from tools.quantizing.measuring import ALL, Question, measure, passes
from tools.quantizing.report import results

PLANS = ("llama", "dyt", "dnt")
HARSH = Treatment("int4", activations=True, per_row=False)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a run of each plan, on the same data."""
    folder = tmp_path_factory.mktemp("numerics")
    config = small_config(folder, prepare_small(folder))
    runs = {}
    for plan in PLANS:
        train_small(replace(config, name=plan, model=replace(config.model, plan=plan)))
        runs[plan] = folder / "runs" / plan
    return runs


call = partial(calling.call, numerics.main)


@pytest.fixture(scope="session")
def answered(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("answered")
    with pytest.MonkeyPatch.context() as patch:
        options = ("--sequences", "6", "--formats", "int8,int4", "--layers", HARSH.name, "--output", output)
        call(patch, *trained.values(), *options)
    return output


def test_one_table_for_all_runs(answered: Path) -> None:
    text = (answered / "report.md").read_text()
    assert "| rounded | llama | dyt | dnt |" in text
    assert "| rounded | dyt − llama | dnt − llama |" in text
    rows = ("weights", "weights and activations")
    for name in ("int8", "int4"):
        for row in rows:
            for scale in ("per tensor", "per row"):
                assert text.count(f"\n| {name}, {row}, {scale} |") == 2
    assert all(text.count(f"\n| bf16, {row} |") == 2 for row in rows)
    assert "## Layer by layer" in text
    assert "Rounding is simulated" in text


def test_the_page_needs_nothing_else(answered: Path) -> None:
    page = (answered / "report.html").read_text()
    figures = sorted(path.stem for path in (answered / "figures").iterdir())
    assert figures == ["changes", "layers", "signals"]
    assert page.count("<figure") == page.count("<svg") == 3
    assert "<img" not in page
    assert "src=" not in page


def test_intervals_are_scipys_of_paired_windows(answered: Path) -> None:
    runs = json.loads((answered / "results.json").read_text())["runs"]
    assert [one["name"] for one in runs] == list(PLANS)
    for one in runs:
        before = np.array(one["window_losses"])
        assert len(before) == one["windows"] == 6
        assert one["loss"] == pytest.approx(before.mean())
        for treatment in one["treatments"].values():
            test = stats.ttest_rel(treatment["window_losses"], before)
            low, high = test.confidence_interval(0.95)
            assert (treatment["low"], treatment["high"]) == pytest.approx((low, high), rel=1e-9, abs=1e-15)
            assert treatment["perplexity_change"] == pytest.approx(np.exp(treatment["change"]) - 1)


def test_a_comparison_pairs_changes_by_window(trained: dict[str, Path], answered: Path) -> None:
    first, other, _ = json.loads((answered / "results.json").read_text())["runs"]
    name = "int4-wa-tensor"
    changes = [np.subtract(one["treatments"][name]["window_losses"], one["window_losses"]) for one in (other, first)]
    low, high = stats.ttest_rel(*changes).confidence_interval(0.95)
    text = (answered / "report.md").read_text().split("## Against llama")[1]
    row = next(line for line in text.splitlines() if line.startswith("| int4, weights and activations, per tensor |"))
    mean, _, half = row.split("|")[2].split()[:3]
    assert float(mean) == pytest.approx((low + high) / 2, abs=1e-5)  # five digits are printed
    assert float(half) == pytest.approx((high - low) / 2, abs=1e-5)


def test_layers_add_up_to_the_table(answered: Path) -> None:
    """All linears layer by layer are the table's row, and each alone is there once."""
    for one in json.loads((answered / "results.json").read_text())["runs"]:
        layers = {(part["block"], part["kind"]): part for part in one["layers"]}
        assert len(layers) == len(one["layers"]) == 2 * 7 + 2 + 7 + 1
        whole, row = layers[ALL, ALL], one["treatments"][HARSH.name]
        assert (whole["change"], whole["low"], whole["high"]) == (row["change"], row["low"], row["high"])
        assert len(one["weights"]) == 14
        assert [part["kinds"] for part in one["inputs"]] == 2 * ["q, k, v", "out", "gate, up", "down"]


def test_the_loss_is_that_of_training_s_validation(trained: dict[str, Path], answered: Path) -> None:
    """On all full windows, against the model's own logits."""
    model = load_run(trained["dyt"], torch.device("cpu"))
    windows = read_windows(model.config, trained["dyt"], 10**6)
    held_out = open_source(model.config.data, 0).validation
    assert held_out is not None
    assert len(windows[0]) == held_out.tokens // 32 >= 6
    for mine, theirs in zip(windows, held_out.read(range(len(windows[0]))), strict=True):
        assert (mine == theirs).all()
    counted: list[None] = []
    question = Question([], None, head=False)
    found = measure("dyt", trained["dyt"], model, windows, question, lambda: counted.append(None))
    inputs, targets = map(torch.from_numpy, windows)
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model.model(inputs).flatten(0, 1), targets.flatten())
    assert np.mean(found.losses) == pytest.approx(wanted.item(), rel=1e-5)
    assert len(counted) == len(windows[0]) * passes(model, question)


def test_progress_reaches_its_end(trained: dict[str, Path]) -> None:
    model = load_run(trained["llama"], torch.device("cpu"))
    windows = read_windows(model.config, trained["llama"], 2)
    counted: list[None] = []
    question = Question([HARSH], HARSH, head=True)
    found = measure("llama", trained["llama"], model, windows, question, lambda: counted.append(None))
    assert len(counted) == 2 * passes(model, question)
    # the table's row has the head rounded too
    assert found.treated[HARSH] != found.layers[ALL, ALL]
    json.dumps(results([found], question), allow_nan=False)


def test_windows_are_spread_evenly(trained: dict[str, Path]) -> None:
    config = load_run(trained["llama"], torch.device("cpu")).config
    every = read_windows(config, trained["llama"], 10**6)[0]
    some = read_windows(config, trained["llama"], 5)[0]
    places = [int(np.flatnonzero((every == row).all(1))[0]) for row in some]
    assert places == [i * len(every) // 5 for i in range(5)]


def test_a_model_that_is_not_sound_is_refused(trained: dict[str, Path]) -> None:
    model = load_run(trained["llama"], torch.device("cpu"))
    model.model.embedding.weight.data.fill_(torch.nan)
    windows = read_windows(model.config, trained["llama"], 2)
    with pytest.raises(ConfigError, match="not finite"):
        measure("llama", trained["llama"], model, windows, Question([HARSH], None, head=False), lambda: None)


def test_one_run_without_layers(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--formats", "fp8", "--layers", "none", "--head", "--sequences", "2", "--output", tmp_path / "out")
    call(monkeypatch, trained["dyt"], *options)
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("| run | plan |")
    assert said.out.endswith(f"report: {tmp_path / 'out' / 'report.html'}\n")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Against" not in text
    assert "Layer by layer" not in text
    assert "and the head" in text
    assert sorted(path.stem for path in (tmp_path / "out" / "figures").iterdir()) == ["changes"]


def copied(run_folder: Path, folder: Path, **data: Any) -> Path:
    """The run with another configuration of its data."""
    shutil.copytree(run_folder, folder)
    text = (folder / "config.yaml").read_text()
    for key, value in data.items():
        before = next(line for line in text.splitlines() if line.startswith(f"  {key}:"))
        text = text.replace(before, f"  {key}: {value}")
    (folder / "config.yaml").write_text(text)
    return folder


def test_mistakes_are_one_line(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = trained["llama"]
    untrained = copied(one, tmp_path / "untrained")
    shutil.rmtree(untrained / "checkpoints")
    data = Path(load_run(one, torch.device("cpu")).config.data.path)
    shutil.copytree(data, tmp_path / "unsplit")
    manifest = next(path for path in (tmp_path / "unsplit").glob("*.json") if "validation" in path.read_text())
    tree = json.loads(manifest.read_text())
    del tree["splits"]["validation"]
    manifest.write_text(json.dumps(tree))
    other = copied(one, tmp_path / "other")
    (other / "tokenizer.model").write_bytes(b"another")
    (tmp_path / "file").write_text("")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((tmp_path / "nowhere",), "is not a run's folder"),
        ((untrained,), "has no checkpoint yet: train it first"),
        ((copied(one, tmp_path / "alone", path=tmp_path / "unsplit"),), "has no validation split: prepare it with"),
        ((other,), "has another tokenizer than"),
        ((one, one), "is named twice"),
        ((one, "--formats", "int7"), "'int7' is no format: did you mean 'int"),
        ((one, "--layers", "int8"), "'int8' is no treatment"),
        ((one, "--sequences", "1"), "--sequences is 1: write 2 or more"),
        ((one, "--output", tmp_path / "file" / "out"), "cannot write the report to"),
    ]
    for arguments, words in cases:
        with pytest.raises(SystemExit) as left:
            call(monkeypatch, *arguments)
        said = capsys.readouterr()
        assert left.value.code == 2, arguments
        assert words in said.err, said.err
        assert said.err.count("\n") == 1
        assert said.out == ""


def test_two_windows_are_needed(trained: dict[str, Path]) -> None:
    config = load_run(trained["llama"], torch.device("cpu")).config
    held_out = open_source(config.data, 0).validation
    assert held_out is not None
    longer = replace(config.data, sequence_length=held_out.tokens // 2 + 1)
    config = replace(config, data=longer, model=replace(config.model, context=longer.sequence_length))
    with pytest.raises(ConfigError, match="fewer than two windows"):
        read_windows(config, trained["llama"], 8)


def test_missing_packages_are_told_first(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "_NEEDED", ("matplotlib", "a_package_that_is_not_there"))
    with pytest.raises(SystemExit):
        call(monkeypatch, trained["llama"])
    assert "the report needs a_package_that_is_not_there: pip install" in capsys.readouterr().err
