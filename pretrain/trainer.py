"""The loop. Everything above ``run`` sets the table; ``run`` is the meal."""

from __future__ import annotations

import dataclasses
import math
import zlib
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models import ConfigError, parameter_roles
from pretrain.agreement import Ranks
from pretrain.batch import make_batch
from pretrain.checkpoint import Checkpointer, Saver, restore_rng_state, rng_state
from pretrain.config import RunConfig
from pretrain.control import Request, Requests, Stop
from pretrain.counts import derive_counts
from pretrain.data import Loader, RankBatch, open_source
from pretrain.distributed import World
from pretrain.engines import build_engine, check_engine
from pretrain.evaluation import Evaluation, evaluate
from pretrain.optimizers import describe, learning_rate_fraction
from pretrain.run import RunFolder
from pretrain.step import learning_rate, train_step
from pretrain.telemetry import MetricsWriter, Throughput, memory_gb, open_console, record_sites, scalars

VOCABULARY_PADDING = 128  # a vocabulary may be rounded up to this multiple, as GPT-2's 50,257 is to 50,304


class Outcome(Enum):
    FINISHED = 0
    DIVERGED = 3
    STOPPED = 75


class Diverged(Exception):
    """The loss is no longer finite."""


def resolve_vocabulary(config: RunConfig, pieces: int) -> RunConfig:
    """``config`` with model.vocab_size, or a ConfigError where it does not fit the tokenizer's ``pieces``."""
    size = pieces if config.model.vocab_size is None else config.model.vocab_size
    largest = -(-pieces // VOCABULARY_PADDING) * VOCABULARY_PADDING
    if not pieces <= size <= largest:
        relation = "smaller" if size < pieces else "larger"
        raise ConfigError(
            f"model.vocab_size {size} is {relation} than the tokenizer's {pieces}: write null, {pieces}, or {largest}"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


class Trainer:
    """One run of one configuration on one world, from wherever its folder stands."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.world = world
        self.ranks = Ranks(world.control)
        self.ranks.each(lambda: self._assemble(config))
        self.engine = self.ranks.each(lambda: build_engine(self.config, world))
        self.has_alphas = "alpha" in parameter_roles(self.engine.model).values()
        self.ranks.first(
            lambda: self.folder.claim(self.config, self.source.tokenizer_path, world, self.engine.settings)
        )
        try:
            self._begin()
        except BaseException:
            self.folder.release()
            raise

    # ------------------------------------------------------------------ before the first step

    def _assemble(self, config: RunConfig) -> None:
        """Everything in which a mistake can show before anything is written, on one rank or all: no collectives."""
        world = self.world
        self.source = open_source(config.data, config.seed, world.rank, world.size)
        self.config = config = resolve_vocabulary(config, self.source.vocabulary)
        self.counts = derive_counts(config, world.size)
        learning_rate_fraction(0, self.counts.steps, config.schedule)
        self.folder = RunFolder(Path(config.runs_dir) / config.name)
        model = check_engine(config, world)
        if config.model.alpha.rule == "measured" and "alpha" not in parameter_roles(model).values():
            raise ConfigError(f"model.alpha.rule is measured, but no site of plan {config.model.plan!r} has an alpha")

    def _begin(self) -> None:
        config, world, keep = self.config, self.world, self.config.checkpoint
        # Of its own, so that a save beside the training never comes between what the loop agrees on. A slow disk is no
        # failure, and a rank that is gone is the watchdog's business.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if world.size > 1 else None
        self.checkpointer = Checkpointer(
            self.folder.checkpoints, keep.keep, keep.keep_every, group, lambda: self.folder.is_ours
        )
        self.step = 0
        self.stopped = Stop.NO
        self.diverged = ""
        self.data_state = self.source.state()
        self.validation: Evaluation | None = None
        self._resume()
        self.console = open_console(self.counts.steps, self.step, world.rank)
        self.saver = Saver(self.checkpointer, keep.asynchronous, self.console.message)
        if self.step == 0 and config.model.alpha.rule == "measured":
            self._measure_alpha()
        self.metrics = self.ranks.each(self._open_metrics)
        self._announce()

    def _resume(self) -> None:
        self.checkpointer.sweep()
        committed = self.checkpointer.latest()
        self._seed(0 if committed is None else committed.step)
        if committed is None:
            self.engine.initialize()
            return
        tensors = self.engine.tensors()
        extras, rank_state = self.checkpointer.load(committed, tensors)
        self.engine.restore(tensors)
        self.source.load_state(extras["data"])
        self.data_state = self.source.state()
        self.step = committed.step
        if rank_state is not None:
            restore_rng_state(rank_state)
        last = self.folder.last_validation()
        if last.get("step") == self.step:
            self.validation = Evaluation(last["val_loss"], last["val_bits_per_byte"])

    def _seed(self, step: int) -> None:
        """Dropout's generator, which a checkpoint of the same world size then sets: other draws on every rank, and
        other ones than before where a run goes on under another world size."""
        torch.manual_seed(zlib.crc32(f"{self.config.seed} {step} {self.world.rank} {self.world.size}".encode()))

    def _open_metrics(self) -> MetricsWriter | None:
        if not self.world.is_main:
            return None
        return MetricsWriter(self.folder.path, self.config.log.tensorboard, self.step)

    def _measure_alpha(self) -> None:
        """On the first rows of the first batch, the same on every rank and under every world size."""
        data = dataclasses.replace(self.config.data, verify=False)
        source = open_source(data, self.config.seed)  # the run's own stays at its start
        rows = torch.from_numpy(source.read(range(min(8, self.counts.sequences)))).to(self.world.device)
        batch = make_batch(rows, source.eos, self.config.data.document_mask)
        for name, alpha in self.engine.measure_alpha(batch, self.config.model.alpha.target).items():
            self.console.message(f"alpha of {name}: {alpha:.4g}")

    def _announce(self) -> None:
        counts, roles = self.counts, parameter_roles(self.engine.model)
        sizes = {name: shape.numel() for name, shape in self.engine.shapes.items()}
        matrices = sum(n for name, n in sizes.items() if roles[name] in ("matrix", "head"))
        if self.config.model.is_tied:
            matrices += self.config.model.vocabulary * self.config.model.width
        self.throughput = Throughput(self.config, self.world, counts, matrices)
        say = self.console.message
        say(
            f"{self.folder.path}: {self.config.model.plan} on the {self.config.model.trunk} trunk, "
            f"{sum(sizes.values()):,} parameters, world size {counts.world_size}, {self.world.device.type}"
        )
        say(
            f"{counts.steps} steps of {counts.batch_tokens:,} tokens = {counts.sequences} sequences = "
            f"{counts.world_size} ranks x {counts.accumulation} micro-batches x {counts.micro_batch}"
        )
        for line in [*self.engine.describe(), *describe(self.engine.optimizer, self.config.optimizer, sizes)]:
            say(line)
        if self.step:
            say(f"going on after step {self.step}")

    def last_line(self, outcome: Outcome) -> str:
        """What there is to say at the end. Of a finished run it is the last line on standard output, which other
        people's tools read."""
        if outcome is Outcome.DIVERGED:
            return self.diverged
        if outcome is Outcome.STOPPED:
            return f"stopped: step {self.step} of {self.counts.steps}, run {self.folder.path}"
        loss, bits = ("none", "none") if self.validation is None else (f"{v:.4f}" for v in self.validation)
        return f"finished: step {self.step}, val_loss {loss}, val_bits_per_byte {bits}, run {self.folder.path}"

    # ------------------------------------------------------------------ the loop

    def run(self) -> Outcome:
        config, counts, console = self.config, self.counts, self.console
        requests = Requests(self.world, self.folder.path, failed=lambda: self.saver.failed)
        loader = Loader(
            self.source,
            batch_size=counts.sequences,
            rank=self.world.rank,
            world_size=counts.world_size,
            first_step=self.step,
            prefetch=config.data.prefetch,
            pin_memory=self.world.device.type == "cuda",
        )
        try:
            with loader, self.saver:
                self.throughput.start(self.step)
                while self.step < counts.steps:
                    self.world.at(self.step + 1, "data")
                    rows = next(loader)
                    self.world.at(self.step + 1, "step")
                    loss, norm = train_step(
                        self.engine, rows.tokens, self.step, config, counts, self.world, self.source.eos
                    )
                    self.throughput.waited(rows.wait_seconds)
                    self.data_state = rows.state
                    self.step += 1
                    record: dict[str, Any] = {}
                    if self._due(config.log.every):
                        record |= self._measured(loss, norm, rows)
                    if self._due(config.validate.every):
                        record |= self._validate(rows)
                    self._write(record)
                    console.advance(self.step)
                    if self._due(config.checkpoint.every):
                        self._save(loss, norm)
                    if self.step < counts.steps and any(request := requests.agreed()):
                        self._save(loss, norm)
                        self.saver.wait()
                        requests.done(request)
                        if request.stop:
                            self.stopped = request.stop
                            return Outcome.STOPPED
            requests.done(Request(Stop.FILE, save=True))  # asked in the last steps
            return Outcome.FINISHED
        except Diverged as diverged:
            self.diverged = str(diverged)
            return Outcome.DIVERGED
        finally:
            console.close()
            if self.metrics is not None:
                self.metrics.close()
            requests.close()  # waits for all ranks, one of which may be gone
            if not self.saver.busy:  # else what writes on unheeded holds the folder until the process ends
                self.folder.release()  # last: until here another process would write beside this one

    def _due(self, every: int) -> bool:
        """Every so many steps, and at the last."""
        return self.step == self.counts.steps or (every > 0 and self.step % every == 0)

    # ------------------------------------------------------------------ around the step

    def _measured(self, loss: Tensor, norm: Tensor, rows: RankBatch) -> dict[str, Any]:
        """Read the metrics: the one place where the host waits for the device."""
        value = self._finite(loss, norm)
        hashes = self.ranks.together(lambda: rows.hash)
        record = {
            "loss": value,
            "lr": learning_rate(self.config, self.counts.steps, self.step - 1),
            "grad_norm": norm.item(),
            "batch_hash": f"{sum(hashes) % 2**64:016x}",
            "memory_gb": memory_gb(self.world.device),
            **self.throughput.read(self.step),
        }
        self.console.report(self.step, record)
        return record

    def _finite(self, loss: Tensor, norm: Tensor) -> float:
        """The global batch's mean loss, or Diverged. An infinite gradient norm ruins the weights just as well."""
        value, size = self.world.sum(loss.clone()).item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(size)):
            raise Diverged(
                f"at step {self.step} the loss is {value} and the gradient norm {size}: lower optimizer.lr, or "
                "lengthen schedule.warmup_steps; earlier checkpoints stay"
            )
        return value

    def _validate(self, rows: RankBatch) -> dict[str, Any]:
        self.world.at(self.step, "validation")
        record: dict[str, Any] = {}
        with self.throughput.paused():
            if self.source.validation is not None:
                held_out, sequences = self.source.validation, self.config.validate.sequences
                self.validation = evaluate(
                    self.engine,
                    held_out,
                    self.world,
                    self.counts.micro_batch,
                    sequences,
                    self.source.eos if self.config.data.document_mask else None,
                )
                if not math.isfinite(self.validation.loss):
                    raise Diverged(f"at step {self.step} the validation loss is {self.validation.loss}")
                record = {"val_loss": self.validation.loss, "val_bits_per_byte": self.validation.bits_per_byte}
                self.console.report(self.step, record)
            if self.has_alphas:
                part = rows.tokens[: self.counts.micro_batch].to(self.world.device)
                batch = make_batch(part, self.source.eos, self.config.data.document_mask)
                record |= scalars(self.engine.observe(batch, record_sites))
        return record

    def _write(self, record: dict[str, Any]) -> None:
        if record and self.metrics is not None:
            self.metrics.write(self.step, {"tokens": self.step * self.counts.batch_tokens, **record})

    def _save(self, loss: Tensor, norm: Tensor) -> None:
        """Commit a checkpoint of what is trained so far; weights that are no longer finite are not worth one."""
        self.world.at(self.step, "checkpoint")
        self._finite(loss, norm)
        with self.throughput.paused():
            self.saver.save(self.step, self.engine.tensors, {"data": self.data_state}, rng_state())
