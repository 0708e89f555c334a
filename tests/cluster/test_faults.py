"""A fault of each kind: the run goes on or ends within its bound. All of them: python -m tests.cluster.faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.faults import suffer
from tests.cluster.slurm import Slurm


@pytest.mark.drill
@pytest.mark.parametrize("fault", ["preemption", "cancel", "rank", "cut", "first"])
def test_fault(slurm4: Slurm, corpus: Path, tmp_path: Path, fault: str) -> None:
    suffer(slurm4, tmp_path, corpus, fault)
