"""A study's grid: which runs follow from a file, and what is refused before the first of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.counts import derive_counts
from tests.runs import TINY
from tests.tools.studied import study, tree, write
from tools.studies.grid import Study, budgets, read_study

STUDIES = Path(__file__).parents[2] / "configs" / "studies"
LLAMA = {"model": {"plan": "llama"}}
TWO_RATES = {"rate": {"tuned": {"tune": {"optimizer.lr": [0.01, 0.1]}}, "fixed": {"optimizer": {"lr": 0.2}}}}


def test_there_are_studies() -> None:
    assert {"tiny.yaml", "dnt.yaml", "fp8.yaml"} <= {path.name for path in STUDIES.glob("*.yaml")}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_that_ships_expands_to_runs(path: Path) -> None:
    """Reading builds every configuration; that its batch divides shows here, before the first hour of a study."""
    found = read_study(path)
    assert found.require_equal_budget
    for cell in [*found.tuning(), *found.final({arm: tried[0] for arm, tried in found.candidates.items()})]:
        for world_size in (1, 2):
            assert cell.config.schedule.warmup_steps < derive_counts(cell.config, world_size).steps


def test_seeds_do_not_multiply_the_grid_of_the_dnt_study() -> None:
    found = read_study(STUDIES / "dnt.yaml")
    assert len(found.candidates) == 12
    assert len(found.tuning()) == 12 * 4
    assert len(found.final({arm: tried[0] for arm, tried in found.candidates.items()})) == 12 * 3
    rates = {arm: tuple(value for ((_, value),) in tried) for arm, tried in found.candidates.items()}
    for optimizer in ("adamw", "msgdw"):
        assert len({grid for arm, grid in rates.items() if arm[1] == optimizer}) == 1, "one grid per optimizer"


def test_the_grid_is_every_choice_with_every_value_and_seed(tmp_path: Path) -> None:
    plans = {"dnt": {"model": {"plan": "dnt"}}, "llama": {"model": {"plan": "llama"}}}
    changes: dict[str, Any] = {"factors": {"plan": plans, **TWO_RATES}, "require_equal_budget": False}
    found = study(tmp_path, **changes, seeds=[0, 1], tune_seeds=None)
    grid = {cell.config.name: cell for cell in found.tuning()}
    assert list(grid) == [
        f"{plan}-{rate}-seed{seed}"
        for plan in ("dnt", "llama")
        for rate in ("tuned-lr0.01", "tuned-lr0.1", "fixed")
        for seed in (0, 1)
    ]
    one = grid["llama-tuned-lr0.01-seed1"]
    assert (one.arm, one.tuned, one.seed) == (("llama", "tuned"), (("optimizer.lr", 0.01),), 1)
    assert (one.config.model.plan, one.config.optimizer.lr, one.config.seed) == ("llama", 0.01, 1)
    assert one.config.model.width == TINY["model"]["width"], "what all share"
    assert one.folder == Path("runs/small/llama-tuned-lr0.01-seed1")
    assert grid["dnt-fixed-seed0"].config.optimizer.lr == 0.2


def test_two_phases(tmp_path: Path) -> None:
    """What there is to choose is run under the tuning seeds, what was chosen under the final ones."""
    found = study(tmp_path, factors=TWO_RATES, require_equal_budget=False, tune_seeds=[5, 6], seeds=[6, 7])
    tuned = [cell.config.name for cell in found.tuning()]
    assert tuned == [f"tuned-lr{rate}-seed{seed}" for rate in ("0.01", "0.1") for seed in (5, 6)]
    final = found.final({("tuned",): (("optimizer.lr", 0.1),), ("fixed",): ()})
    assert [cell.config.name for cell in final] == [
        "tuned-lr0.1-seed6",
        "tuned-lr0.1-seed7",
        "fixed-seed6",
        "fixed-seed7",
    ]
    assert final[0] in found.tuning(), "the same run, which need not be run again"


@settings(max_examples=15)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=3))
def test_no_two_cells_share_a_folder(rates: list[float], seeds: list[int]) -> None:
    """Names carry six digits: values that differ in the seventh, like a value given twice, are refused."""
    factors = {"rate": {"tuned": {"tune": {"optimizer.lr": rates}}}}
    found = Study.model_validate(tree(factors=factors, seeds=seeds, tune_seeds=None))
    if len({f"{rate:g}" for rate in rates}) == len(rates) and len(set(seeds)) == len(seeds):
        found.check()
        assert max(Counter(cell.folder for cell in found.tuning()).values()) == 1
    else:
        with pytest.raises(ConfigError, match=r"two cells are called (tuned-lr|seed)"):
            found.check()


def test_budgets_are_equal_or_it_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, tree(factors=TWO_RATES))
    with pytest.raises(ConfigError, match=r"unequally many values \(tuned 2, fixed 1\).*require_equal_budget: false"):
        read_study(path)
    found = study(tmp_path, factors=TWO_RATES, require_equal_budget=False)
    assert budgets(found) == {("tuned",): 2, ("fixed",): 1}


MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"factor": {}}, ["'factor'", "did you mean 'factors'?"]),
    ({"name": "a/b"}, ["name is 'a/b'"]),
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
    ({"factors": {"plan": {"llama": LLAMA}}}, ["tune_seeds is given", "nothing to tune"]),
    ({"seeds": []}, ["seeds is []"]),
    ({"tune_seeds": []}, ["tune_seeds is []"]),
    ({"stop_early": {"after": 0.3}}, ["stop_early.worse_by", "required"]),
    ({"stop_early": {"after": 30, "worse_by": 0.5}}, ["stop_early.after is 30", "less than 1"]),
    ({"stop_early": {"after": 0.3, "worse_by": 0.5, "than": 1}}, ["stop_early.than"]),
    ({"factors": {"batch": {"odd": {"train": {"batch_tokens": 33}}}}}, ["train.batch_tokens 33", "write 32"]),
    ({"seeds": [0, 0]}, ["two cells are called"]),
    ({"factors": {"a": {"x-y": LLAMA, "x": LLAMA}, "b": {"z": LLAMA, "y-z": LLAMA}}}, ["two cells are called x-y-z"]),
]


@pytest.mark.parametrize(("changes", "names"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_one_line(tmp_path: Path, changes: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        read_study(write(tmp_path, tree(**changes)))
    for name in names:
        assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_parts_are_one_line(tmp_path: Path) -> None:
    for key in ("name", "run", "factors"):
        part = tree()
        del part[key]
        with pytest.raises(ConfigError, match=f"{key} is missing"):
            read_study(write(tmp_path, part))
    with pytest.raises(ConfigError, match="no configuration file"):
        read_study(tmp_path / "nowhere.yaml")
