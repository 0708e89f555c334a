"""What a study says of runs whose losses are known: the choice, the intervals, the comparisons, and every caution."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from tests.tools.studied import ran, study
from tools.studies.choosing import choose
from tools.studies.grid import Cell, Study
from tools.studies.outcomes import look, write_hopeless
from tools.studies.report import write_verdict
from tools.studies.verdict import Verdict

LLAMA, DNT = ("llama", "tuned"), ("dnt", "tuned")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rate(cell: Cell) -> float:
    return dict(cell.tuned)["optimizer.lr"]


def tune(found: Study, loss: Callable[[Cell], float | None]) -> None:
    for cell in found.tuning():
        ran(cell, loss(cell))


def finish(found: Study, loss: Callable[[Cell], float | None]) -> None:
    for cell in found.final(choose(found, [look(cell, found.stop_early) for cell in found.tuning()])):
        ran(cell, loss(cell))


def inner_is_best(cell: Cell) -> float:
    return 3.0 if rate(cell) == 0.1 else 4.0


def ordinary(cell: Cell) -> float:
    """dnt ahead by 0.5 and 0.1 times the seed, seeds far apart."""
    return 3.0 + cell.seed - (0.5 + 0.1 * cell.seed if cell.arm == DNT else 0.0)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Verdict, str]]:
    """A study in which all went well, and its report, for tests that only read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("complete"))
        found = study(folder)
        tune(found, inner_is_best)
        finish(found, ordinary)
        verdict = Verdict.of(found)
        yield verdict, write_verdict(verdict)


def test_the_best_has_the_lowest_mean_over_the_seeds(here: Path) -> None:
    """Seed 0 alone would choose 0.01, the mean chooses 0.1; 1.0 has the lowest loss and a seed that diverged."""
    losses: dict[tuple[float, int], float | None] = {(0.01, 0): 2.0, (0.01, 1): 4.0, (0.1, 0): 2.5, (0.1, 1): 2.7}
    losses |= {(1.0, 0): 1.0, (1.0, 1): None}
    found = study(here, tune_seeds=[0, 1], seeds=[2, 3, 4])
    tune(found, lambda cell: None if cell.arm == DNT else losses[rate(cell), cell.seed])
    results = [look(cell, None) for cell in found.tuning()]
    assert choose(found, results) == {LLAMA: (("optimizer.lr", 0.1),)}, "an arm that only diverged has no best"
    finish(found, ordinary)
    verdict = Verdict.of(found)
    assert [(one.cell.arm, rate(one.cell), one.cell.seed) for one in verdict.final] == [
        (LLAMA, 0.1, seed) for seed in (2, 3, 4)
    ]
    assert any("dnt tuned: no value finished under every tuning seed" in line for line in verdict.cautions)


def test_an_arm_that_tried_less_is_not_compared(here: Path) -> None:
    found = study(here)
    for cell in found.tuning():
        if (cell.arm, rate(cell)) != (DNT, 1.0):
            ran(cell, inner_is_best(cell))
    finish(found, ordinary)
    verdict = Verdict.of(found)
    assert [*verdict.chosen] == [LLAMA]
    (comparison,) = verdict.comparisons
    assert (comparison.test, comparison.reason) == (None, "dnt tuned: 1 unfinished")
    assert "the study is not complete: dnt-tuned-lr1-seed0 not finished" in verdict.cautions[0]


def test_losses_and_differences(complete: tuple[Verdict, str]) -> None:
    """Against figures by hand, with t(0.975, 2) = 4.302653: losses 4, 5, 6 and differences -0.6, -0.7, -0.8."""
    verdict, _ = complete
    assert verdict.loss(LLAMA) == pytest.approx((5.0, 5 - 4.302653 / 3**0.5, 5 + 4.302653 / 3**0.5, 3), abs=1e-5)
    assert verdict.bits_per_byte(LLAMA) == pytest.approx(2.5)
    (found,) = verdict.comparisons
    assert (found.arm, found.reference, found.name) == (DNT, LLAMA, "dnt tuned − llama tuned")
    assert found.test is not None
    half = 4.302653 * 0.1 / 3**0.5
    assert found.test.difference == pytest.approx((-0.7, -0.7 - half, -0.7 + half, 3), abs=1e-5)
    assert found.test.p == found.adjusted == pytest.approx(0.0067, abs=1e-4)  # t = 0.7 / (0.1 / sqrt 3) = 12.12
    assert verdict.speed(LLAMA) == (1010.5, 0.5)
    assert verdict.cautions == []


def test_what_is_compared_with_what(here: Path) -> None:
    """Each arm with the first, and with those that differ from it in one factor, which has its first choice there."""
    factors = {
        "plan": {plan: {"model": {"plan": plan}} for plan in ("llama", "dnt", "peri")},
        "rate": {"low": {"optimizer": {"lr": 0.1}}, "high": {"optimizer": {"lr": 0.2}}},
    }
    found = study(here, factors=factors, tune_seeds=None, seeds=[0])
    names = [one.name for one in Verdict.of(found).comparisons]
    assert names == [
        "llama high − llama low",
        "dnt low − llama low",
        "dnt high − llama low",
        "dnt high − llama high",
        "dnt high − dnt low",
        "peri low − llama low",
        "peri high − llama low",
        "peri high − llama high",
        "peri high − peri low",
    ]


def test_no_mean_over_the_seeds_that_survived(here: Path) -> None:
    found = study(here)
    tune(found, inner_is_best)
    finish(found, lambda cell: None if (cell.arm, cell.seed) == (DNT, 2) else ordinary(cell))
    verdict = Verdict.of(found)
    assert verdict.loss(DNT) is verdict.bits_per_byte(DNT) is None
    assert verdict.comparisons[0].reason == "dnt tuned: 1 diverged"
    assert "dnt tuned: 1 of 3 final runs diverged at optimizer.lr 0.1" in verdict.cautions[0]
    text = write_verdict(verdict)
    assert "| dnt | tuned | optimizer.lr 0.1 | none: 1 diverged |" in text
    assert "| dnt tuned − llama tuned | not compared | dnt tuned: 1 diverged |" in text


def cautions(here: Path, tuned: Callable[[Cell], float | None] = inner_is_best, **changes: Any) -> str:
    found = study(here, **changes)
    tune(found, tuned)
    finish(found, ordinary)
    return "\n".join(Verdict.of(found).cautions)


def test_a_best_at_the_edge_is_said(here: Path) -> None:
    assert "the grid does not enclose the best of llama tuned: optimizer.lr 0.01 is at its edge" in cautions(here, rate)


def test_a_best_beside_what_diverged_is_enclosed(here: Path) -> None:
    assert cautions(here, lambda cell: None if rate(cell) == 1.0 else inner_is_best(cell)) == ""


def test_unequal_budgets_and_lengths_are_said(here: Path) -> None:
    factors = {
        "rate": {
            "tuned": {"tune": {"optimizer.lr": [0.01, 0.1, 1.0]}},
            "fixed": {"optimizer": {"lr": 0.2}, "train": {"steps": 10}},
        }
    }
    said = cautions(here, factors=factors, require_equal_budget=False)
    assert "unequal tuning budgets, values tried by arm: tuned 3, fixed 1" in said
    assert "unequal training, tokens of one run: tuned 1,280, fixed 640" in said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seeds": [1]}, "one seed: there are no intervals and no tests"),
        ({"seeds": [1, 2]}, "two seeds: intervals are very wide"),
        ({"seeds": [0, 1, 2]}, "(seeds 0): the losses of the chosen are optimistic"),
        ({"tune_seeds": None}, "(seeds 1, 2, 3): the losses of the chosen are optimistic"),
    ],
)
def test_what_seeds_can_show_is_said(here: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in cautions(here, **changes)


def test_other_code_is_said(here: Path) -> None:
    found = study(here)
    tune(found, inner_is_best)
    finish(found, ordinary)
    cells = found.tuning()
    ran(cells[0], 4.0, git_revision="def", git_changes=True)
    ran(cells[1], 3.0, packages={"torch": "2.12"})
    said = "\n".join(Verdict.of(found).cautions)
    assert "different revisions of the code: abc, def" in said
    assert "changes that are not committed" in said
    assert "different versions of packages" in said


def test_what_was_stopped_early_is_listed_and_counts_as_worse(here: Path) -> None:
    found = study(here, stop_early={"after": 0.3, "worse_by": 0.5})
    assert found.stop_early is not None
    tune(found, inner_is_best)
    stopped = next(cell for cell in found.tuning() if cell.arm == LLAMA and rate(cell) == 1.0)
    ran(stopped, 1.0, code=75, text="stopped: step 8 of 20")
    write_hopeless(
        stopped, {"step": 7, "loss": 5.0, "best": "x", "best_loss": 4.0, "rule": found.stop_early.model_dump()}
    )
    finish(found, ordinary)
    verdict = Verdict.of(found)
    assert verdict.chosen[LLAMA] == (("optimizer.lr", 0.1),), "the value that was stopped had the lowest loss"
    text = write_verdict(verdict)
    assert "- 1 tuning runs were stopped early" in text
    assert "**0.1: 3.0000**; 1: 1 stopped early" in text
    assert re.search(r"\| llama-tuned-lr1-seed0 \| tuning \| stopped early \|.*at step 7 its loss was 5.000", text)
    assert "past 30% of its steps is stopped once its training loss is more than 0.5 nats above" in text


class Page(HTMLParser):
    """What a browser would load, and whether every element that was opened is closed again."""

    VOID = ("meta", "br", "img", "hr", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.loads += [value for key, value in attributes if key in ("src", "href", "xlink:href", "data") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()


def test_the_report_is_one_page_and_the_same_as_markdown(complete: tuple[Verdict, str]) -> None:
    verdict, text = complete
    folder = verdict.study.folder
    assert (folder / "report.md").read_text() == text
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert [load for load in page.loads if not load.startswith("#")] == [], "nothing from elsewhere"
    assert page.count["svg"] == page.count["figure"] == 4
    assert page.count["h2"] == text.count("\n## ")
    assert "url(http" not in html
    assert "<script" not in html
    figures = re.findall(r"!\[[^]]+\]\((figures/[a-z-]+(?:\.lr)?\.svg)\)", text)
    assert len(figures) == 4
    for figure in figures:
        assert ET.fromstring((folder / figure).read_text()).tag == "{http://www.w3.org/2000/svg}svg"
    for row in (
        "| llama | tuned | optimizer.lr 0.1 | 5.0000 | 2.5159 to 7.4841 | 2.5000 | 4.0000, 5.0000, 6.0000 |",
        "| dnt tuned − llama tuned | -0.7000 | -0.9484 to -0.4516 | 0.0067 | 0.0067 | 3 |",
        "| llama | tuned | optimizer.lr | 0.01: 4.0000; **0.1: 3.0000**; 1: 4.0000 |",
        "| llama | tuned | 3 | 3 | 0 | 0 | 3 | 0 | 1,280 | 1,010 | 0.50 |",
    ):
        assert row in text
        assert page_has(html, row), row
    write_verdict(verdict)
    assert (folder / "report.html").read_text() == html, "the same results are the same file"


def page_has(html: str, row: str) -> bool:
    """A row of a Markdown table, in HTML."""
    cells = [re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", cell.strip()) for cell in row.strip("| ").split(" | ")]
    return "\n".join(f"<td>{cell}</td>" for cell in cells) in html


def test_everything_to_repeat_it_is_there(complete: tuple[Verdict, str]) -> None:
    """The configuration of each cell: what all share once, and a row for each."""
    _, text = complete
    assert "mSGDW: momentum 0.9 stored in fp32, dampening 0, no Nesterov, lr 0.1" in text, "as a run says it"
    assert "effective step 1 " in text
    assert "\nmodel.width: 32\n" in text
    assert "\nmodel.vocab_size: 512\n" in text, "as the run resolved it"
    assert "| cell | seed | model.plan | optimizer.lr |" in text
    assert '| dnt-tuned-lr0.01-seed0 | 0 | "dnt" | 0.01 |' in text
    assert '\ngit_revision: "abc"\n' in text
    assert '\npackages.torch: "2.13"\n' in text
    assert "        optimizer.lr:\n        - 0.01\n" in text, "the study's file"


def test_results_for_programs(complete: tuple[Verdict, str]) -> None:
    found = json.loads((complete[0].study.folder / "results.json").read_text())
    dnt = found["arms"][1]
    assert (dnt["arm"], dnt["tuned"], dnt["values_tried"]) == (
        {"plan": "dnt", "rate": "tuned"},
        {"optimizer.lr": 0.1},
        3,
    )
    assert dnt["seeds"] == pytest.approx({"1": 3.4, "2": 4.3, "3": 5.2})
    assert dnt["loss"]["n"] == 3
    assert found["comparisons"][0]["p_holm"] == pytest.approx(0.0067, abs=1e-4)
    assert set(found["cells"].values()) == {"finished"}


def test_a_report_before_the_first_run(here: Path) -> None:
    text = write_verdict(Verdict.of(study(here)))
    assert "- the study is not complete" in text
    assert "| llama | tuned | none | none: 3 unfinished |" in text


def test_a_folder_that_cannot_be_written(here: Path) -> None:
    (here / "runs").write_text("")
    with pytest.raises(ConfigError, match="cannot write the report to runs/small"):
        write_verdict(Verdict.of(study(here)))
