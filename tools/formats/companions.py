"""What goes beside the weights in every folder made from a run, so that the run can be had back from it.

``config.yaml`` is the run's configuration; ``equipoise.json`` says at which step it was, where its data goes on, and
which of the files are its tokenizer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import ConfigError
from pretrain.cli import dump
from pretrain.config import RunConfig
from pretrain.files import write_synced
from pretrain.run import RunFolder
from tools.formats.files import read_json
from tools.formats.lazy import LazyTensor
from tools.formats.tokenizer import FILES
from tools.formats.weights import Weights
from tools.formats.writing import write_json

_STATE = "equipoise.json"


@dataclass(frozen=True)
class Companions:
    """What was read beside the weights."""

    config: RunConfig
    step: int
    data: dict[str, Any]
    tokenizer: dict[str, bytes]

    def weights(self, model: dict[str, LazyTensor]) -> Weights:
        return Weights(self.config, model, self.step, self.data, tokenizer=self.tokenizer)


def read(folder: Path) -> Companions | None:
    """None if the folder has no config.yaml. ConfigError if what it has is damaged."""
    if not (folder / "config.yaml").is_file():
        return None
    config = RunFolder(folder).read_config()
    if config.model.vocab_size is None:
        raise ConfigError(f"{folder / 'config.yaml'}: model.vocab_size is null: write how many rows the embedding has")
    state = read_json(folder / _STATE) if (folder / _STATE).is_file() else {}
    step, data = state.get("step", 0), state.get("data", {})
    names = state.get("tokenizer", list(FILES))
    if not isinstance(step, int) or step < 0 or not isinstance(data, dict) or not isinstance(names, list):
        raise ConfigError(f"{folder / _STATE} is damaged: remove it to start at step 0")
    tokenizer = {name: content for name, content in read_tokenizer(folder).items() if name in names}
    return Companions(config, step, data, tokenizer)


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The files of ``folder`` that belong to a tokenizer."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def write(weights: Weights, folder: Path) -> None:
    """Adds them to ``folder``; of the tokenizer only what is not there yet, perhaps in a form of the format's own."""
    write_synced(folder / "config.yaml", dump(weights.config).encode())
    write_json(folder / _STATE, {"step": weights.step, "data": weights.data, "tokenizer": sorted(weights.tokenizer)})
    for name, content in weights.tokenizer.items():
        if not (folder / name).exists():
            write_synced(folder / name, content)
