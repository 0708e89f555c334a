"""The random generators of a process, as values that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's global generators (CPU, and the current GPU if there is one).

    Nothing but tensors and plain values, so that ``torch.load(weights_only=True)`` reads it back.
    """
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002, libraries draw from the global one
    assert isinstance(numpy_state, dict)
    numpy_state["state"]["key"] = torch.from_numpy(numpy_state["state"]["key"].copy())
    state = {"python": random.getstate(), "numpy": numpy_state, "cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def restore_rng_state(state: dict[str, Any]) -> None:
    """Undoes every draw since `rng_state`; a GPU's state is left out where there is no GPU."""
    random.setstate(state["python"])
    generator = state["numpy"]["state"]
    np.random.set_state(state["numpy"] | {"state": generator | {"key": generator["key"].numpy()}})  # noqa: NPY002
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
