"""A model much larger than what a conversion may hold, from several shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tools.convert_cost import measure


@pytest.mark.parametrize("target", ["safetensors", pytest.param("native", marks=pytest.mark.drill)])
def test_memory_does_not_grow_with_the_model(target: str, tmp_path: Path) -> None:
    """438 MB in shards of 100 MB, of which the largest tensor has 66. Python, torch and the rest take 0.5 GB by
    themselves, and two tensors are there at a time, to native in fp32. Its time is convert_cost's subject: a disk that
    others use meanwhile says nothing of it."""
    try:
        cost = measure(tmp_path / "cost", 0.2, 10**8, target, rounds=1)
    finally:
        shutil.rmtree(tmp_path / "cost", ignore_errors=True)
    assert cost.read_bytes > 4e8
    assert cost.written_bytes > (8.7e8 if target == "native" else 4e8)
    assert cost.peak_bytes < 0.9e9
