"""A run that is preempted in every phase comes out as if nobody had; with 30 rounds: python -m tests.cluster.drill."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.drill import PHASES, drill
from tests.cluster.slurm import Slurm


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_preempted_in_every_phase(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    rounds = drill(slurm, tmp_path, corpus, len(PHASES), seed=0)
    assert [one.phase for one in rounds] == list(PHASES)
