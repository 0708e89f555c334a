"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.data import austen
from pretrain.data.preparation import Settings, prepare

torch.set_num_threads(1)  # the tests' processes share two cores


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: the first 400,000 characters of Emma in 20 documents, 512 pieces."""
    folder = tmp_path_factory.mktemp("corpus")
    text = austen.novels()["Emma"][:400_000]
    source = folder / "text"
    source.mkdir()
    for i in range(20):
        (source / f"{i:02}.txt").write_text(text[i * 20_000 : (i + 1) * 20_000])
    prepare([str(source)], folder / "prepared", Settings(vocab_size=512, validation_fraction=0.2), workers=1)
    return folder / "prepared"
