"""Loss and bits per byte of a run's newest checkpoint on held-out text.

    python -m tools.evaluate runs/tiny --split test
    python -m tools.evaluate runs/tiny --text novel.txt --stride 64

Windows of the run's sequence length begin every ``stride`` tokens, and a token is scored in the first window that
reaches it, so that each has at least sequence length - stride tokens before it, save at the start of the text. With a
stride of the sequence length this is what training reports as val_loss.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from models import ConfigError, Transformer
from models.loss import IGNORE
from pretrain.batch import document_numbers
from pretrain.data import Tokenizer
from pretrain.data.manifest import open_split, read_manifest, sha256_of
from pretrain.data.source import TokenArray
from pretrain.files import write_atomically
from tools.command import run
from tools.loading import TrainedRun, load_run

_TOKENS_AT_ONCE = 8192  # enough to keep a device busy, few enough for a laptop


class HeldOut(NamedTuple):
    """A stream of tokens whose first is not a target, and the bytes of UTF-8 text behind the targets."""

    name: str
    tokens: TokenArray
    bytes: int


class Score(NamedTuple):
    loss: float  # nats a target
    bits_per_byte: float
    targets: int


def prepared_split(trained: TrainedRun, run_folder: Path, split: str) -> HeldOut:
    """A split of the data that the run was trained on. ConfigError if the folder holds other data by now."""
    data = trained.config.data
    if data.source != "prepared":
        raise ConfigError(f"{run_folder} was trained on a stream, which has no splits here: write --text FILE")
    folder = Path(data.path)
    manifest = read_manifest(folder)
    if sha256_of(run_folder / "tokenizer.model") != manifest.tokenizer_sha256:
        raise ConfigError(f"{folder} has another tokenizer than {run_folder}: restore it, or write --text FILE")
    shards = open_split(folder, manifest, split, verify=data.verify)
    return HeldOut(split, TokenArray(shards), manifest.split(split, folder).bytes)


def read_texts(paths: Sequence[Path], tokenizer: Tokenizer) -> HeldOut:
    """Each file is a document. An end of document goes before the first, so that all tokens of the text are targets."""
    tokens, size = [tokenizer.eos], 0
    for path in paths:
        try:
            content = path.read_bytes()
            text = content.decode("utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not UTF-8: give plain text") from None
        if not text:
            raise ConfigError(f"{path} is empty: give some text")
        tokens += [*tokenizer.encode(text), tokenizer.eos]
        size += len(content)
    return HeldOut(", ".join(map(str, paths)), TokenArray([np.array(tokens)]), size)


def windows(tokens: TokenArray, length: int, stride: int, eos: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets), int64 [length], that score every token but the first exactly once.

    The first window scores all that it sees, the others their last ``stride``; what is seen only as context, and the
    filling (of ``eos``) after the end of the text, has the target ``IGNORE``.
    """
    assert 1 <= stride <= length
    scored = 0  # tokens 1 .. scored have been targets
    for start in range(0, len(tokens), stride):
        inputs = np.full(length, eos, np.int64)
        targets = np.full(length, IGNORE, np.int64)
        count = min(length, len(tokens) - 1 - start)
        text = tokens.read(start, count + 1)
        inputs[:count] = text[:-1]
        targets[scored - start : count] = text[scored - start + 1 :]
        yield inputs, targets
        scored = start + count
        if scored == len(tokens) - 1:
            return


@torch.no_grad()
def score(
    model: Transformer, text: HeldOut, *, length: int, stride: int, eos: int, masked: bool, bf16: bool, chunk: int
) -> Score:
    """The mean loss over ``text``, in fp32 or by bf16 autocast; ``chunk`` tokens have logits at once, and attention
    stays within a document if ``masked``."""
    device = model.embedding.weight.device
    batch = max(1, _TOKENS_AT_ONCE // length)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    count = 1 + -(-max(0, len(text.tokens) - 1 - length) // stride)
    console = Console(stderr=True)
    progress = track(windows(text.tokens, length, stride, eos), text.name, count, console=console, transient=True)
    for i, row in enumerate(progress, 1):
        rows.append(row)
        if len(rows) == batch or i == count:
            inputs, targets = (_stack(part).to(device) for part in zip(*rows, strict=True))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                documents = document_numbers(inputs, eos) if masked else None
                nats += model(inputs, targets, documents, loss_chunk=chunk)[1]
            rows.clear()
    targets_scored = len(text.tokens) - 1
    total = nats.item()
    return Score(total / targets_scored, total / math.log(2) / text.bytes, targets_scored)


def _stack(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


def read_results(path: Path) -> dict[str, Any]:
    """What earlier evaluations of the run found, by the name of the text; empty if there were none."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        results = None
    if not isinstance(results, dict):
        raise ConfigError(f"{path} is damaged: move it away")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description="Bits per byte of a run's model.")
    parser.add_argument("run", type=Path, help="the run's folder")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--split", default="validation", help="of the run's prepared data (default validation)")
    text.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="plain text files instead, a document each")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (default: half of the sequence length)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default cpu)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but no GPU is visible here; write cpu")

    folder: Path = arguments.run
    trained = load_run(folder, torch.device(arguments.device))
    length = trained.config.data.sequence_length
    stride = max(1, length // 2) if arguments.stride is None else arguments.stride
    if not 1 <= stride <= length:
        raise ConfigError(f"--stride is {stride}: write a number from 1 to the sequence length, {length}")
    output = folder / "evaluation.json"
    results = read_results(output)
    if arguments.text:
        held_out = read_texts(arguments.text, trained.tokenizer)
    else:
        held_out = prepared_split(trained, folder, arguments.split)
    compute = trained.config.precision.compute
    found = score(
        trained.model,
        held_out,
        length=length,
        stride=stride,
        eos=trained.tokenizer.eos,
        masked=trained.config.data.document_mask,
        bf16=compute == "bf16",
        chunk=trained.config.train.loss_chunk,
    )
    settings = {"step": trained.step, "sequence_length": length, "stride": stride, "precision": compute}
    results[held_out.name] = {**found._asdict(), "bytes": held_out.bytes, **settings}
    try:
        write_atomically(output, json.dumps(results, indent=2).encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from None
    print(
        f"{held_out.name}: loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte, {found.targets:,} tokens, "
        f"step {trained.step}, stride {stride} of {length}"
    )


if __name__ == "__main__":
    run(main)
