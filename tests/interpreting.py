"""Triton's interpreter: ``interpreted(function, argument, ...)`` runs a function where kernels compute on the CPU.

That is decided when Triton is imported, for a whole process: so it has one of its own, which stays for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch

from models import kernels
from tests.ranks import fork_server

needs_triton = pytest.mark.skipif(not kernels.is_installed(), reason="Triton is not installed")


def interpret_here() -> None:
    """This process, which has not imported Triton yet, interprets from here on."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    assert kernels.is_interpreted()


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=fork_server(), initializer=interpret_here)


def interpreted(function: Callable[..., Any], *args: Any, timeout: float = 120) -> Any:
    """``function(*args)``, by a function of a module (it is pickled by name); what it raises is raised here."""
    return _process().submit(function, *args).result(timeout)
