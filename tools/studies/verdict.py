"""What a study found: of every arm the chosen values and the final losses, differences between arms, and every reason
to be careful with them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

from pretrain.counts import derive_counts
from pretrain.run import RunFolder
from tools.studies.choosing import at_edges, choose
from tools.studies.grid import Arm, Cell, Study, Tuned, budgets, named, shown
from tools.studies.outcomes import Result, look, look_at_tuning
from tools.studies.statistics import Interval, PairedTest, holm, interval, paired


@dataclass(frozen=True)
class Comparison:
    """``arm`` minus ``reference``. ``test`` and ``adjusted`` (p after Holm) are None where ``reason`` says why."""

    arm: Arm
    reference: Arm
    test: PairedTest | None = None
    adjusted: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{named(self.arm)} − {named(self.reference)}"


@dataclass(frozen=True)
class Verdict:
    """Everything that the report says, from the folders of the study's cells."""

    study: Study
    tuning: list[Result]
    final: list[Result]
    chosen: dict[Arm, Tuned]

    @classmethod
    def of(cls, study: Study) -> Verdict:
        """As far as the cells are over."""
        tuning = look_at_tuning(study)
        chosen, known = choose(study, tuning), {result.cell: result for result in tuning}
        return cls(study, tuning, [known.get(cell) or look(cell, None) for cell in study.final(chosen)], chosen)

    @cached_property
    def cells(self) -> list[Result]:
        """All of them, each once: some of the final ones were run for tuning."""
        return list({result.cell: result for result in [*self.final, *self.tuning]}.values())

    @cached_property
    def edges(self) -> dict[Arm, list[str]]:
        return at_edges(self.study, self.chosen)

    def finals(self, arm: Arm) -> list[Result]:
        """In the order of the seeds."""
        return [result for result in self.final if result.cell.arm == arm]

    def tried(self, arm: Arm) -> list[Result]:
        return [result for result in self.tuning if result.cell.arm == arm]

    def losses(self, arm: Arm) -> list[float] | None:
        """Of every final seed; None unless all finished: a mean over those that did would flatter the arm."""
        finished = [result.loss for result in self.finals(arm) if result.loss is not None]
        return finished if len(finished) == len(self.study.seeds) else None

    def loss(self, arm: Arm) -> Interval | None:
        losses = self.losses(arm)
        return None if losses is None else interval(losses)

    def bits_per_byte(self, arm: Arm) -> float | None:
        """The mean over the final seeds."""
        found = [result.bits_per_byte for result in self.finals(arm) if result.bits_per_byte is not None]
        return sum(found) / len(found) if self.losses(arm) is not None else None

    def why_no_loss(self, arm: Arm) -> str:
        """Where ``loss`` is None."""
        states = Counter(result.state for result in (self.finals(arm) if arm in self.chosen else self.tried(arm)))
        states.pop("finished", None)
        if arm in self.chosen or states["unfinished"]:
            return ", ".join(f"{count} {state}" for state, count in states.items())
        return "no value finished under every tuning seed"

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every arm with the first one, and with the arms that have the first choice of one factor and else its own.
        Holm is over all that have a test."""
        found = []
        for arm, reference in _pairs(self.study):
            first, second = self.losses(arm), self.losses(reference)
            if first is None or second is None:
                without = arm if first is None else reference
                found.append(Comparison(arm, reference, reason=f"{named(without)}: {self.why_no_loss(without)}"))
            elif len(first) == 1:
                found.append(Comparison(arm, reference, reason="one seed"))
            else:
                found.append(Comparison(arm, reference, paired(first, second)))
        tests = [one.test for one in found if one.test is not None]
        adjusted = iter(holm([test.p for test in tests]))
        return [one if one.test is None else replace(one, adjusted=next(adjusted)) for one in found]

    @cached_property
    def reused(self) -> list[int]:
        """The final seeds that the values were chosen by, too."""
        by = self.study.seeds if self.study.tune_seeds is None else self.study.tune_seeds
        tuned = max(budgets(self.study).values()) > 1
        return [seed for seed in self.study.seeds if seed in by and tuned]

    def speed(self, arm: Arm) -> tuple[float | None, float | None]:
        """Median tokens per second and greatest memory in GB of the final runs."""
        records = [record for result in self.finals(arm) for record in RunFolder(result.cell.folder).records()]
        rates = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
        memory = [record["memory_gb"] for record in records if record.get("memory_gb")]
        return (median(rates) if rates else None), max(memory, default=None)

    @cached_property
    def environments(self) -> dict[Cell, dict[str, Any]]:
        """What each run wrote down of where it ran, as far as it began."""
        paths = {result.cell: RunFolder(result.cell.folder).environment for result in self.cells}
        return {cell: json.loads(path.read_text(encoding="utf-8")) for cell, path in paths.items() if path.exists()}

    @cached_property
    def cautions(self) -> list[str]:
        """What a reader must know before the figures, the gravest first. One line each."""
        return [*_of_completeness(self), *_of_tuning(self), *_of_seeds(self), *_of_versions(self)]


def tokens(cell: Cell) -> int:
    """That one whole run of the cell trains on."""
    counts = derive_counts(cell.config, world_size=1)
    return counts.steps * counts.batch_tokens


def _pairs(study: Study) -> Iterator[tuple[Arm, Arm]]:
    first = tuple(next(iter(choices)) for choices in study.factors.values())
    seen: set[tuple[Arm, Arm]] = set()
    for arm in itertools.product(*study.factors.values()):
        references = [first, *((*arm[:i], first[i], *arm[i + 1 :]) for i in range(len(arm)))]
        for reference in references:
            if arm != reference and (arm, reference) not in seen:
                seen.add((arm, reference))
                yield arm, reference


def _of_completeness(verdict: Verdict) -> Iterator[str]:
    unfinished = [result.cell.config.name for result in verdict.cells if not result.is_over]
    if unfinished:
        more = f" and {len(unfinished) - 3} more" if len(unfinished) > 3 else ""
        yield (
            f"the study is not complete: {', '.join(unfinished[:3])}{more} not finished; arms that miss a run are not "
            "compared, and arms that miss a tuning run have no final ones yet"
        )
    for arm in verdict.study.candidates:
        if arm not in verdict.chosen and all(result.is_over for result in verdict.tried(arm)):
            yield f"{named(arm)}: no value finished under every tuning seed, so it has no result; try smaller ones"
    for arm in verdict.chosen:
        diverged = sum(result.state == "diverged" for result in verdict.finals(arm))
        if diverged:
            yield (
                f"{named(arm)}: {diverged} of {len(verdict.study.seeds)} final runs diverged at "
                f"{shown(verdict.chosen[arm])}; a mean over the others would flatter it, so none is printed"
            )


def _of_tuning(verdict: Verdict) -> Iterator[str]:
    study = verdict.study
    if len({*budgets(study).values()}) > 1:
        counts = ", ".join(f"{named(arm)} {count}" for arm, count in budgets(study).items())
        yield f"unequal tuning budgets, values tried by arm: {counts}; arms that tried more had the better chance"
    lengths = {arm: tokens(study.example(arm)) for arm in study.candidates}
    if len({*lengths.values()}) > 1:
        yield "unequal training, tokens of one run: " + ", ".join(f"{named(arm)} {n:,}" for arm, n in lengths.items())
    for arm, keys in verdict.edges.items():
        values = shown(tuple(pair for pair in verdict.chosen[arm] if pair[0] in keys))
        yield f"the grid does not enclose the best of {named(arm)}: {values} is at its edge, better may lie beyond"
    stopped = sum(result.state == "stopped early" for result in verdict.tuning)
    if stopped:
        yield f"{stopped} tuning runs were stopped early and count as worse than any that finished; they are listed"


def _of_seeds(verdict: Verdict) -> Iterator[str]:
    study = verdict.study
    if len(study.seeds) == 1:
        yield "one seed: there are no intervals and no tests, and differences cannot be told from chance"
    elif len(study.seeds) == 2:
        yield "two seeds: intervals are very wide (t = 12.7)"
    if verdict.reused:
        seeds = ", ".join(map(str, verdict.reused))
        yield (
            f"values were chosen by the same runs that are reported (seeds {seeds}): the losses of the chosen are "
            "optimistic, about equally so for arms with equal budgets; final seeds that tune_seeds lacks avoid that"
        )


def _of_versions(verdict: Verdict) -> Iterator[str]:
    found = verdict.environments.values()
    revisions = {str(one.get("git_revision")) for one in found}
    if len(revisions) > 1:
        yield f"cells ran on different revisions of the code: {', '.join(sorted(revisions))}"
    if any(one.get("git_changes") for one in found):
        yield "the code had changes that are not committed, so its revision does not tell all of it"
    if len({json.dumps(one.get("packages"), sort_keys=True) for one in found}) > 1:
        yield "cells ran with different versions of packages; they are listed"
