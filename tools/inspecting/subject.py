"""One trained run as the measurements see it: its model, text to run it on, and what it logged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import ConfigError, Transformer, parameter_roles
from models.loss import IGNORE
from pretrain.batch import Batch, document_numbers, make_batch
from pretrain.checkpoint import Checkpointer
from pretrain.config import RunConfig
from pretrain.data import EvaluationSet, open_source
from pretrain.data.manifest import sha256_of
from pretrain.run import RunFolder
from tools.evaluate import scored
from tools.harness.text import read_texts
from tools.loading import TrainedRun, load_run

_AT_ONCE = 8192  # tokens that go through the model together

KINDS = ("embedding", "positions", "q", "k", "v", "out", "gate", "up", "down", "head")


@dataclass(eq=False)
class Subject:
    """``training`` is what the run would train on next; ``held_out`` comes from its validation split. Both have the
    same number of sequences unless there is less text than that, and are where ``model`` is, in fp32, without
    dropout."""

    label: str
    folder: Path
    model: Transformer
    config: RunConfig
    step: int
    training: Batch
    held_out: Batch
    records: list[dict[str, Any]]

    @property
    def length(self) -> int:
        return self.training.inputs.shape[1]

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader must know of the run to read the figures."""
        model, config = self.config.model, self.config
        return {
            "run": str(self.folder),
            "step": self.step,
            "plan": model.plan,
            "trunk": model.trunk,
            "optimizer": config.optimizer.name,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "width": model.width,
            "depth": model.depth,
            "heads": model.heads,
            "kv_heads": model.key_value_heads,
            "tied": model.is_tied,
            "batch_tokens": config.train.batch_tokens,
            "training_sequences": len(self.training.inputs),
            "held_out_sequences": len(self.held_out.inputs),
            "sequence_length": self.length,
        }


def open_subject(
    folder: Path, label: str, step: int | None, sequences: int, texts: list[Path] | None, device: torch.device
) -> Subject:
    """The model of the newest checkpoint, or of ``step``'s, with ``sequences`` of its data or of ``texts``.

    Raises:
        ConfigError: no run, no such checkpoint, or no text that it could be run on.
    """
    trained = load_run(folder, device)
    if step is not None and step != trained.step:
        trained = trained._replace(step=_go_to(trained.model, folder, step))
    if texts is None:
        training, held_out = _own_data(trained, folder, sequences)
    else:
        training = held_out = _of_texts(trained, texts, sequences)
    records = [record for record in RunFolder(folder).records() if record["step"] <= trained.step]
    return Subject(
        label,
        folder,
        trained.model,
        trained.config,
        trained.step,
        _on(device, training),
        _on(device, held_out),
        records,
    )


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some sequences of ``batch``."""
    return Batch(batch.inputs[rows], batch.targets[rows], None if batch.documents is None else batch.documents[rows])


def chunks(batch: Batch) -> Iterator[Batch]:
    """Parts of ``batch`` that a laptop's memory holds."""
    rows = max(1, _AT_ONCE // batch.inputs.shape[1])
    for begin in range(0, len(batch.inputs), rows):
        yield rows_of(batch, slice(begin, begin + rows))


@torch.no_grad()
def forward(subject: Subject, part: Batch) -> Tensor:
    """The loss in nats, fp32 [], summed over the targets of ``part``."""
    total: Tensor = subject.model(*part, loss_chunk=subject.config.train.loss_chunk)[1]
    return total


def mean_loss(subject: Subject, batch: Batch) -> float:
    """In nats per target."""
    total = sum(forward(subject, part).double() for part in chunks(batch))
    return float(total) / int(batch.targets.ne(IGNORE).sum())


class Weight:
    """A matrix of the model: its parameter's name, its kind (:data:`KINDS`) and its block, None outside of them."""

    def __init__(self, name: str, parameter: Tensor) -> None:
        parts = name.split(".")
        self.name, self.parameter = name, parameter
        self.kind = parts[-2]
        self.block = int(parts[1]) if parts[0] == "blocks" else None


def weights(model: Transformer) -> list[Weight]:
    """Embedding, matrices and head, in the model's order."""
    roles = parameter_roles(model)
    parameters = dict(model.named_parameters())
    return [Weight(name, parameters[name]) for name in roles if roles[name] in ("embedding", "matrix", "head")]


def _go_to(model: Transformer, folder: Path, step: int) -> int:
    checkpointer = Checkpointer(RunFolder(folder).checkpoints, keep=1, keep_every=None)  # reads only
    committed = checkpointer.latest(until=step)
    if committed is None or committed.step != step:
        kept = sorted(int(path.name.removeprefix("step-")) for path in checkpointer.folder.glob("step-*"))
        raise ConfigError(
            f"--step is {step}: {folder} has whole checkpoints of other steps, {', '.join(map(str, kept))}"
        )
    tensors = {"model": model.state_dict()}
    checkpointer.load(committed, tensors)
    model.load_state_dict(tensors["model"])
    return step


def _own_data(trained: TrainedRun, folder: Path, sequences: int) -> tuple[Batch, Batch]:
    config = trained.config
    own = RunFolder(folder).tokenizer
    if not own.is_file():
        raise ConfigError(f"{folder} came with another tokenizer than our data have: write --text FILE")
    source = open_source(replace(config.data, verify=False), config.seed)
    if sha256_of(own) != sha256_of(source.tokenizer_path):
        raise ConfigError(f"the data of {folder} have another tokenizer by now: restore them, or write --text FILE")
    # A stream is read from its start: to pass over all that was trained on would take as long as training did.
    begin = (
        trained.step * config.train.batch_tokens // config.data.sequence_length
        if config.data.source == "prepared"
        else 0
    )
    rows = torch.from_numpy(source.read(range(begin, begin + sequences)))
    training = make_batch(rows, source.eos, config.data.document_mask)
    if source.validation is None:
        return training, training
    return training, _held_out(source.validation, sequences, source.eos if config.data.document_mask else None)


def _held_out(split: EvaluationSet, sequences: int, mask_eos: int | None) -> Batch:
    """Windows spread evenly over the split, as pretrain.evaluation takes them."""
    count = min(sequences, split.count)
    inputs, targets = map(torch.from_numpy, split.read([i * split.count // count for i in range(count)]))
    return Batch(inputs, targets, None if mask_eos is None else document_numbers(inputs, mask_eos))


def _of_texts(trained: TrainedRun, texts: list[Path], sequences: int) -> Batch:
    tokens = read_texts(texts, scored(trained, bf16=False)).tokens
    length = trained.config.data.sequence_length
    count = min(sequences, (len(tokens) - 1) // length)
    if count < 2:
        raise ConfigError(f"--text has {len(tokens)} tokens: give two sequences of {length} at least")
    rows = [tokens.read(i * (len(tokens) - 1 - length) // (count - 1), length + 1) for i in range(count)]
    return make_batch(torch.stack([torch.from_numpy(row) for row in rows]), trained.tokenizer.eos, False)


def _on(device: torch.device, batch: Batch) -> Batch:
    documents = None if batch.documents is None else batch.documents.to(device)
    return Batch(batch.inputs.to(device), batch.targets.to(device), documents)
