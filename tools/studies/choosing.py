"""Of every arm the tuned values that count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import inf
from statistics import fmean

from tools.studies.grid import Arm, Study, Tuned
from tools.studies.outcomes import Result


def scores(results: Iterable[Result]) -> dict[tuple[Arm, Tuned], float]:
    """Mean validation loss over the seeds of each candidate; infinite if one diverged, was stopped or is missing."""
    losses: defaultdict[tuple[Arm, Tuned], list[float]] = defaultdict(list)
    for result in results:
        losses[result.cell.arm, result.cell.tuned].append(result.score)
    return {candidate: fmean(seeds) for candidate, seeds in losses.items()}


def choose(study: Study, tuning: Iterable[Result]) -> dict[Arm, Tuned]:
    """The candidate with the lowest score, the first of equals; the only one where there is but one.

    An arm is left out if none of its candidates finished under every seed, or if one is not over yet: an arm that has
    tried less than it may is not compared.
    """
    results = list(tuning)
    waiting = {result.cell.arm for result in results if not result.is_over}
    means = scores(results)
    chosen: dict[Arm, Tuned] = {}
    for arm, candidates in study.candidates.items():
        if len(candidates) == 1:
            chosen[arm] = candidates[0]
            continue
        best = min(candidates, key=lambda tuned: means[arm, tuned])
        if arm not in waiting and means[arm, best] < inf:
            chosen[arm] = best
    return chosen


def at_edges(study: Study, chosen: dict[Arm, Tuned]) -> dict[Arm, list[str]]:
    """Of each arm the keys whose chosen value is the least or greatest that was tried: a better one may lie beyond."""
    found: dict[Arm, list[str]] = {}
    for arm, tuned in chosen.items():
        for position, (key, value) in enumerate(tuned):
            tried = {candidate[position][1] for candidate in study.candidates[arm]}
            if len(tried) > 1 and value in (min(tried), max(tried)):
                found.setdefault(arm, []).append(key)
    return found
