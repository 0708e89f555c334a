"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.runs import prepare_corpus

torch.set_num_threads(1)  # the tests' processes share two cores
settings.register_profile("equipoise", deadline=None)  # and may wait for one
settings.load_profile("equipoise")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: the first 400,000 characters of Emma in 20 documents, 512 pieces."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))
