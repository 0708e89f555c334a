"""A study's file, and the runs that follow from it.

Under ``factors`` every combination of one choice each is an arm; what a choice has under ``tune`` is tried in each of
its arms. ``run`` is what all runs share, and may have a ``tune`` too. With ``tune_seeds`` the values are tried under
those seeds, and only the best of each arm is trained under ``seeds``, so that several seeds do not multiply the grid;
without, the whole grid is run under ``seeds``. A run of the grid is a cell, and its name says all that sets it apart.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from models.errors import ConfigError, nearest
from models.plan import resolve_plan
from pretrain.cli import build, merge, read_tree
from pretrain.config import RunConfig
from pretrain.counts import derive_counts

Arm = tuple[str, ...]
Tuned = tuple[tuple[str, int | float], ...]

_Filled = Field(min_length=1)
_Seeds = Annotated[list[int], _Filled]


class Choice(BaseModel, strict=True, extra="allow"):
    """Keys of a run, which are checked as each cell is built, and values to try."""

    tune: dict[str, Annotated[list[int | float], _Filled]] = {}


class StopEarly(BaseModel, strict=True, extra="forbid", frozen=True):
    """When a cell that is tuned is hopeless. ``after``: a share of its steps; ``worse_by``: nats of training loss."""

    after: Annotated[float, Field(gt=0, lt=1)]
    worse_by: Annotated[float, Field(gt=0)]


class Study(BaseModel, strict=True, frozen=True):
    """The shape of a study's file."""

    name: Annotated[str, Field(pattern=r"^[^./][^/]*$")]
    run: Choice
    factors: Annotated[dict[str, Annotated[dict[str, Choice], _Filled]], _Filled]
    seeds: _Seeds = [0]
    tune_seeds: _Seeds | None = None
    require_equal_budget: bool = True
    stop_early: StopEarly | None = None

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name

    @cached_property
    def candidates(self) -> dict[Arm, list[Tuned]]:
        """The tuned values that each arm may choose from, in the file's order; an empty one if it tunes nothing."""
        found: dict[Arm, list[Tuned]] = {}
        for arm in itertools.product(*self.factors.values()):
            grid = self._tree(arm).get("tune", {})
            found[arm] = [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        return found

    @cached_property
    def configs(self) -> dict[tuple[Arm, Tuned], RunConfig]:
        """Of every candidate, checked; its name is that of its cells less their seed."""
        found = {}
        for arm, candidates in self.candidates.items():
            for tuned in candidates:
                name = "".join(["-".join(arm), *(f"-{key.rsplit('.', 1)[-1]}{value:g}" for key, value in tuned)])
                tree = self._tree(arm) | {"name": name, "runs_dir": str(self.folder)}
                tree.pop("tune", None)
                for key, value in tuned:
                    tree = merge(tree, _nested(key, value))
                config = build(tree, f"cell {name}")
                resolve_plan(config.model)
                derive_counts(config, world_size=1)
                found[arm, tuned] = config
        return found

    def cell(self, arm: Arm, tuned: Tuned, seed: int) -> Cell:
        """One run."""
        config = self.configs[arm, tuned]
        return Cell(arm, tuned, seed, replace(config, name=f"{config.name}-seed{seed}", seed=seed))

    def tuning(self) -> list[Cell]:
        """What is run to choose each arm's values; under ``tune_seeds`` nothing for an arm with one candidate."""
        return [
            self.cell(arm, tuned, seed)
            for arm, candidates in self.candidates.items()
            for tuned in (candidates if len(candidates) > 1 or self.tune_seeds is None else [])
            for seed in (self.seeds if self.tune_seeds is None else self.tune_seeds)
        ]

    def final(self, chosen: Mapping[Arm, Tuned]) -> list[Cell]:
        """What the arms are compared by: their chosen values under ``seeds``. Some may have been run for tuning."""
        return [self.cell(arm, tuned, seed) for arm, tuned in chosen.items() for seed in self.seeds]

    def example(self, arm: Arm) -> Cell:
        """Any run of ``arm``."""
        return self.cell(arm, self.candidates[arm][0], self.seeds[0])

    def check(self) -> None:
        """Every run that may come, before the first one: its configuration is valid and its name its own."""
        names = Counter(self.configs[arm, tuned].name for arm, tried in self.candidates.items() for tuned in tried)
        twice = [name for name, count in names.items() if count > 1]
        for seeds in (self.seeds, self.tune_seeds or []):
            twice += [f"seed {seed}" for seed, count in Counter(seeds).items() if count > 1]
        if twice:
            raise ConfigError(
                f"two cells are called {twice[0]}: let seeds, tuned values (to six digits) and choices differ"
            )

    def _tree(self, arm: Arm) -> dict[str, Any]:
        tree = self.run.model_dump(exclude_unset=True)
        for choices, name in zip(self.factors.values(), arm, strict=True):
            tree = merge(tree, choices[name].model_dump(exclude_unset=True))
        return tree


@dataclass(frozen=True)
class Cell:
    """One run of the grid: an arm, the tuned values, a seed."""

    arm: Arm
    tuned: Tuned
    seed: int
    config: RunConfig = field(compare=False, repr=False)

    @property
    def folder(self) -> Path:
        return Path(self.config.runs_dir) / self.config.name


def named(arm: Arm) -> str:
    """An arm as a person reads it."""
    return " ".join(arm)


def shown(tuned: Tuned) -> str:
    """Tuned values as a person reads them."""
    return ", ".join(f"{key} {value:g}" for key, value in tuned) or "nothing tuned"


def tuned_keys(study: Study) -> list[str]:
    """Those of which some arm tries several values."""
    keys: dict[str, set[int | float]] = {}
    for candidates in study.candidates.values():
        for key, value in itertools.chain.from_iterable(candidates):
            keys.setdefault(key, set()).add(value)
    return [key for key, values in keys.items() if len(values) > 1]


def budgets(study: Study) -> dict[Arm, int]:
    """How many candidates each arm chooses from."""
    return {arm: len(candidates) for arm, candidates in study.candidates.items()}


def read_study(path: Path) -> Study:
    """The study in a YAML file, checked to the last cell."""
    tree = read_tree(path)
    for key in tree:
        if key not in Study.model_fields:
            raise ConfigError(f"{path}: a study has no key {key!r}; {nearest(key, Study.model_fields)}")
    for key, wanted in Study.model_fields.items():
        if wanted.is_required() and key not in tree:
            raise ConfigError(f"{path}: {key} is missing; see configs/studies/tiny.yaml")
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{path}: {where} is {first['input']!r}: {first['msg'].lower()}; see configs/studies/tiny.yaml"
        ) from None
    study.check()
    if study.tune_seeds is not None and max(budgets(study).values()) == 1:
        raise ConfigError(
            f"{path}: tune_seeds is given, but there is nothing to tune: remove it, or add lists under tune"
        )
    if study.require_equal_budget and len({*budgets(study).values()}) > 1:
        counts = ", ".join(f"{named(arm)} {count}" for arm, count in budgets(study).items())
        raise ConfigError(
            f"{path}: arms are tuned over unequally many values ({counts}), which favours some: give all as many, or "
            "write require_equal_budget: false, which the report will say"
        )
    return study


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)
