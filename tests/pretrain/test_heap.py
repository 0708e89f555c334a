"""A step on a CPU faults in its memory once; the environment's own word on malloc stands."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.runs import REPOSITORY

BLOCK, REPEATS, WARMUP = 2**26, 20, 5  # 64 MiB: above what glibc's own threshold grows to
PROGRAM = f"""
import resource, sys
import torch
from pretrain.heap import keep_heap

kept = keep_heap() if sys.argv[1] == "keep" else None
for i in range({REPEATS + WARMUP}):
    if i == {WARMUP}:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros({BLOCK // 4}).add_(1)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool, **environment: str) -> tuple[str, int]:
    """What keep_heap said, and the page faults of REPEATS blocks after the WARMUP."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    command = [sys.executable, "-c", PROGRAM, "keep" if keep else "leave"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=clean | environment, capture_output=True, text=True, timeout=120, check=True
    )
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_memory_is_faulted_in_once() -> None:
    said, kept = faults(keep=True)
    _, given_back = faults(keep=False)
    assert said == "True"
    assert given_back >= REPEATS * BLOCK / 2**21  # a fault a page, of up to 2 MiB where pages may be huge
    assert kept < given_back / 4


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_the_environment_s_word_stands(variable: str) -> None:
    said, count = faults(keep=True, **{variable: "65536"})
    assert said == "False"
    assert count >= REPEATS * BLOCK / 2**21
