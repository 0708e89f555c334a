"""Which format a path is in, told by what is there and not by its name."""

from __future__ import annotations

from pathlib import Path

from models.errors import ConfigError
from tools.formats import deepspeed, gguf, huggingface, native, single
from tools.formats.weights import Weights


def read(path: Path, *, allow_pickle: bool, with_optimizer: bool) -> tuple[str, Weights]:
    """(the format's name, the weights). ConfigError if it is none that is known, or damaged."""
    if path.is_dir():
        if deepspeed.is_checkpoint(path):
            return "deepspeed", deepspeed.read(path, allow_pickle, with_optimizer)
        if (path / "config.json").is_file():
            _no_state(with_optimizer, "a Hugging Face folder")
            return "hf", huggingface.read(path, allow_pickle)
        if single.holds_weights(path):
            return "torch or safetensors", single.read(path, allow_pickle, with_optimizer)
        if (path / "config.yaml").is_file() or (path / ".metadata").is_file():
            return "native", native.read(path, with_optimizer)
        raise ConfigError(
            f"{path} is nothing that can be converted: give a run's folder, a checkpoint in it, a Hugging Face folder, "
            "a DeepSpeed checkpoint, or a torch, safetensors or GGUF file"
        )
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give a folder or file to convert")
    with path.open("rb") as file:
        head = file.read(9)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "torch", single.read(path, allow_pickle, with_optimizer)
    if head[:4] == b"GGUF":
        _no_state(with_optimizer, "a GGUF file")
        return "gguf", gguf.read(path)
    if head[8:9] == b"{":
        if (path.parent / "config.json").is_file():
            return "hf", huggingface.read(path.parent, allow_pickle)
        return "safetensors", single.read(path, allow_pickle, with_optimizer)
    raise ConfigError(f"{path} is no torch, safetensors or GGUF file")


def _no_state(asked: bool, what: str) -> None:
    if asked:
        raise ConfigError(f"{what} holds no optimizer state: leave --optimizer out")
