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

from models import ConfigError, known_failures, parameter_roles
from pretrain.agreement import Ranks
from pretrain.batch import make_batch
from pretrain.checkpoint import Checkpointer, Committed, Saver, restore_rng_state, rng_state
from pretrain.config import RunConfig
from pretrain.control import Request, Requests, Stop
from pretrain.counts import derive_counts
from pretrain.data import Loader, RankBatch, open_source
from pretrain.distributed import World
from pretrain.engines import build_engine, check_engine
from pretrain.evaluation import Evaluation, evaluate
from pretrain.optimizers import alpha_factor, describe, learning_rate_fraction
from pretrain.rollback import Rollbacks
from pretrain.run import RunFolder
from pretrain.step import learning_rate, train_step
from pretrain.telemetry import MetricsWriter, Throughput, memory_gb, open_console
from pretrain.telemetry.inspection import Inspection

VOCABULARY_PADDING = 128  # a vocabulary may be rounded up to this multiple, as GPT-2's 50,257 is to 50,304


class Outcome(Enum):
    FINISHED = 0
    DIVERGED = 3
    STOPPED = 75


class Diverged(Exception):
    """The loss is no longer finite, or no step is taken any more."""


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
        alpha_factor(0, self.counts.steps, config.optimizer.alpha)
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
        self.step = self.left_out = 0
        self.stopped = Stop.NO
        self.diverged = ""
        self.data_state = self.source.state()
        self.rollbacks = Rollbacks(config.train.rollback)
        self.validation: Evaluation | None = None
        is_new = not self._resumed()
        self.console = open_console(self.counts.steps, self.step, world.rank)
        self.saver = Saver(self.checkpointer, keep.asynchronous, self.console.message)
        if is_new and config.model.alpha.rule == "measured":
            self._measure_alpha()
        self.metrics = self.ranks.each(self._open_metrics)
        self.inspection = Inspection(config, self.counts, self.engine, world, self.source.eos)
        self._announce()

    def _resumed(self) -> bool:
        """Whether there was a checkpoint to go on from, perhaps of step 0 (tools.convert); else weights are new."""
        self.checkpointer.sweep()
        committed = self.checkpointer.latest()
        self._seed(0 if committed is None else committed.step)
        if committed is None:
            self.engine.initialize()
            return False
        extras, rank_state = self._load(committed)
        self.source.load_state(extras["data"])
        self.data_state = self.source.state()
        if "rollbacks" in extras:
            self.rollbacks.load_state(extras["rollbacks"])
        if rank_state is not None:
            restore_rng_state(rank_state)
        last = self.folder.last_validation()
        if last.get("step") == self.step:
            self.validation = Evaluation(last["val_loss"], last["val_bits_per_byte"])
        return True

    def _load(self, committed: Committed) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The model and its optimizer; returns what else the checkpoint has, of the run and of this rank."""
        tensors = self.engine.tensors()
        extras, rank_state = self.checkpointer.load(committed, tensors)
        self.engine.restore(tensors)
        if self.engine.guard is not None and "guard" in extras:
            self.engine.guard.load_state(extras["guard"])
        self.step, self.left_out = committed.step, self._left_out()
        return extras, rank_state

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
        optimizer = describe(self.engine.optimizer, self.config.optimizer, sizes)
        for line in [*self.engine.describe(), *optimizer, *self.inspection.describe()]:
            say(line)
        for line in known_failures(self.config.model):
            say(f"warning: {line}")
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
        config, counts = self.config, self.counts
        requests = Requests(self.world, self.folder.path, failed=lambda: self.saver.failed)
        loader = Loader(
            self.source,
            batch_size=counts.sequences,
            rank=self.world.rank,
            world_size=counts.world_size,
            first_step=self.step + self.rollbacks.passed_over,
            prefetch=config.data.prefetch,
            pin_memory=self.world.device.type == "cuda",
        )
        try:
            with loader, self.saver:
                self.throughput.start(self.step)
                owed = Request(Stop.NO, save=False)
                while self.step < counts.steps:
                    self.world.at(self.step + 1, "data")
                    rows = next(loader)
                    self.world.at(self.step + 1, "step")
                    watch = self.inspection.of_step(self.step + 1)
                    loss, norm = train_step(
                        self.engine, rows.tokens, self.step, config, counts, self.world, self.source.eos, watch
                    )
                    self.throughput.waited(rows.wait_seconds)
                    self.data_state = rows.state
                    self.step += 1
                    inspected = {} if watch is None else self.inspection.read(watch, rows.tokens)
                    if self._after_step(loss, norm, rows, inspected):
                        continue
                    if self.step < counts.steps and any(owed := owed.and_also(requests.agreed())):
                        if not self._save(loss, norm):
                            continue
                        self.saver.wait()
                        requests.done(owed)
                        if owed.stop:
                            self.stopped = owed.stop
                            return Outcome.STOPPED
                        owed = Request(Stop.NO, save=False)
            requests.done(Request(Stop.FILE, save=True))  # asked in the last steps
            return Outcome.FINISHED
        except Diverged as diverged:
            self.diverged = str(diverged)
            return Outcome.DIVERGED
        finally:
            self.console.close()
            if self.metrics is not None:
                self.metrics.close()
            requests.close()  # waits for all ranks, one of which may be gone
            if not self.saver.busy:  # else what writes on unheeded holds the folder until the process ends
                self.folder.release()  # last: until here another process would write beside this one

    def _due(self, every: int) -> bool:
        """Every so many steps, and at the last."""
        return self.step == self.counts.steps or (every > 0 and self.step % every == 0)

    # ------------------------------------------------------------------ around the step

    def _after_step(self, loss: Tensor, norm: Tensor, rows: RankBatch, record: dict[str, Any]) -> bool:
        """Log ``record`` and what else is due, validate and save. True if the run has gone back instead: it stands at
        another step."""
        try:
            if self._due(self.config.log.every):
                record = self._measured(loss, norm, rows) | record
                if self.rollbacks.lasts and self._went_back(f"a spike has lasted to step {self.step}"):
                    return True
            if self._due(self.config.validate.every):
                record |= self._validate(rows)
            self._write(record)
            self.console.advance(self.step)
            # In a spike nothing is worth keeping, and what is kept instead would go.
            if self._due(self.config.checkpoint.every) and (
                self.step == self.counts.steps or not self.rollbacks.spikes
            ):
                self._save(loss, norm)
        except Diverged as diverged:
            if not self._went_back(str(diverged)):
                raise
            return True
        return False

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
            **self._cared(value),
        }
        self.console.report(self.step, record)
        return record

    def _cared(self, loss: float) -> dict[str, int]:
        """Steps left out and times gone back, if there is care for such things."""
        record: dict[str, int] = {}
        left_out = self._left_out()
        if self.engine.guard is not None:
            record["steps_left_out"] = left_out
        if left_out > self.left_out:
            self.console.message(f"to step {self.step}: {left_out - self.left_out} left out, {left_out} in all")
        self.left_out = left_out
        self.rollbacks.add(self.step, loss, left_out)
        if self.rollbacks.are_on:
            record["rollbacks"] = self.rollbacks.done
            record["sequences_passed_over"] = self.rollbacks.passed_over * self.counts.sequences
        return record

    def _left_out(self) -> int:
        return 0 if self.engine.guard is None else int(self.engine.guard.left_out)

    def _finite(self, loss: Tensor, norm: Tensor) -> float:
        """The global batch's mean loss, or Diverged. An infinite gradient norm ruins the weights just as well."""
        value, size = self.world.sum(loss.clone()).item(), norm.item()
        guard = self.engine.guard
        lost = guard.is_stuck if guard is not None else not (math.isfinite(value) and math.isfinite(size))
        if lost:
            since = "" if guard is None else f", the last {self.config.train.skip_window} steps were left out"
            raise Diverged(
                f"at step {self.step} the loss is {value} and the gradient norm {size}{since}: lower optimizer.lr, or "
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
                record |= self.inspection.alphas(rows.tokens)
        return record

    def _write(self, record: dict[str, Any]) -> None:
        if record and self.metrics is not None:
            self.metrics.write(self.step, {"tokens": self.step * self.counts.batch_tokens, **record})

    def _save(self, loss: Tensor, norm: Tensor) -> bool:
        """Commit a checkpoint of what is trained so far; weights whose last loss is not finite are not worth one."""
        self.world.at(self.step, "checkpoint")
        value = self._finite(loss, norm)
        if not math.isfinite(value):  # the step was left out, and perhaps the weights are bad
            if self.step == self.counts.steps:
                raise Diverged(f"at step {self.step}, the last, the loss is {value}; earlier checkpoints stay")
            self.console.message(f"no checkpoint at step {self.step}, where the loss is {value}")
            return False
        extras: dict[str, Any] = {"data": self.data_state}
        if self.engine.guard is not None:
            extras["guard"] = self.engine.guard.state()
        if self.rollbacks.are_on or self.rollbacks.passed_over:
            extras["rollbacks"] = self.rollbacks.state()
        with self.throughput.paused():
            self.saver.save(self.step, self.engine.tensors, extras, rng_state())
        return True

    def _went_back(self, why: str) -> bool:
        """To the last checkpoint from before the spike, while the data goes on after it; False if that cannot be."""
        if not self.rollbacks.is_allowed:
            return False
        self.world.at(self.step, "checkpoint")
        self.saver.wait()
        committed = self.checkpointer.latest(self.rollbacks.good_step)
        if committed is None:
            return False
        left = self.step
        self.checkpointer.drop_after(committed.step)
        extras, _ = self._load(committed)
        self.rollbacks.went_back(left - self.step, extras.get("rollbacks"))
        if self.metrics is not None:
            self.metrics.close()
        self.metrics = self.ranks.each(self._open_metrics)  # without the lines of later steps
        self.throughput.start(self.step)
        self.console.message(
            f"{why}: back to the checkpoint of step {self.step}, past {left - self.step} batches of data, "
            f"{self.rollbacks.done} of {self.config.train.rollback.times} times"
        )
        return True
