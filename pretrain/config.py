"""RunConfig: a whole run in one typed tree. Reading YAML and the command line into it is cli.py's business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.config import ModelConfig, setting
from models.errors import ConfigError, nearest

INSPECTED = ("alpha", "saturation", "outliers", "attention", "gradients", "updates", "noise")  # of log.inspect


@dataclass(frozen=True)
class StreamConfig:
    """Training straight from a Hugging Face dataset, without preparation (data.source: stream)."""

    dataset: str | None = setting(None, "a dataset's name on the hub, or a folder or file of text, JSONL or Parquet")
    subset: str | None = setting(None, "the dataset's configuration name")
    split: str = setting("train", "the split to train on")
    validation_split: str | None = setting(None, "the split to validate on; null: no validation")
    validation_documents: int = setting(200, "documents of it to use", unit="documents")
    text_key: str = setting("text", "the column with the text")
    tokenizer: str | None = setting(None, "a sentencepiece model file")
    lanes: int = setting(
        64, "documents are dealt to this many token streams in turn; best a multiple of the ranks", unit="streams"
    )


@dataclass(frozen=True)
class DataConfig:
    source: Literal["prepared", "stream"] = setting(
        "prepared", "prepared: a folder made by tools.prepare; stream: a Hugging Face dataset as it is"
    )
    path: str = setting("data/austen", "the prepared folder")
    sequence_length: int = setting(256, "tokens that the model sees at once", unit="tokens")
    document_mask: bool = setting(False, "attention stays within a document; the first token of one is no target")
    prefetch: int = setting(4, "batches made ahead of the step by a background thread", unit="batches")
    verify: bool = setting(True, "checksum every shard before the first step")
    stream: StreamConfig = setting(StreamConfig, "for source stream")


@dataclass(frozen=True)
class RollbackConfig:
    """Spikes are looked for in what is logged (pretrain/rollback.py)."""

    times: int = setting(0, "how often at most a run goes back to its last good checkpoint; 0: never")
    sigma: float = setting(
        6.0, "a loss is a spike that is above the mean of the 32 logged before by more than so many deviations"
    )
    after: int = setting(
        3, "the run goes back after so many logged intervals in a row with a spike, or with a step left out"
    )


@dataclass(frozen=True)
class TrainConfig:
    steps: int | None = setting(None, "length of the run; or give tokens", unit="steps")
    tokens: int | None = setting(None, "length of the run; rounded up to whole steps", unit="tokens")
    batch_tokens: int = setting(8192, "tokens of one optimizer step, over all ranks", unit="tokens")
    micro_batch: int | None = setting(
        None, "sequences a rank passes forward at once; null: its whole share", unit="sequences"
    )
    clip: float | None = setting(1.0, "largest global gradient norm; null: none")
    skip_norm_sigma: float | None = setting(
        None,
        "a step is left out whose gradient norm is not finite, or above the mean of those before it by more than so "
        "many of their standard deviations; null: no step is",
    )
    skip_window: int = setting(128, "how many norms before it; until there are so many, only the first", unit="steps")
    rollback: RollbackConfig = setting(RollbackConfig, "back before a loss spike that lasts, and past its data")
    z_loss: float = setting(0.0, "coefficient of the mean squared log-partition function (PaLM: 1e-4)")
    loss_chunk: int = setting(2048, "tokens whose logits exist at once", unit="tokens")
    kernels: Literal["auto", "triton", "torch"] = setting(
        "auto",
        "fused kernels for norms with what stands beside them, rotary positions, SwiGLU and cross-entropy; triton: "
        "those of models/kernels; torch: none, PyTorch's own operations; auto: triton on a GPU that has it, else torch",
    )
    compile: bool = setting(False, "torch.compile every block")
    cuda_graphs: bool = setting(
        False,
        "compiled blocks are replayed as CUDA graphs: for models so small that a GPU waits for the host; one process, "
        "one micro-batch a step",
    )
    activation_checkpointing: Literal["none", "full", "selective"] = setting(
        "none",
        "what the backward computes again instead of keeping it; full: whole blocks; selective: all but matrix "
        "products and attention, or whole blocks here and there (checkpoint_every_block)",
    )
    checkpoint_every_block: int | None = setting(
        None, "selective: every so-manieth block is computed again whole, the others not at all", unit="blocks"
    )


@dataclass(frozen=True)
class LionConfig:
    beta1: float = setting(0.9, "share of the moment in the update")
    beta2: float = setting(0.99, "decay of the moment; for T5 the authors took 0.95 and 0.98")


@dataclass(frozen=True)
class MuonConfig:
    momentum: float = setting(0.95, "of the matrices, with Nesterov's variant")
    adjust_lr: Literal["original", "match_rms_adamw"] = setting(
        "match_rms_adamw",
        "factor on a matrix's learning rate; original: sqrt(max(1, rows / columns)); match_rms_adamw: "
        "0.2 sqrt(max(rows, columns)), so that AdamW's learning rate serves all roles",
    )
    others: Literal["adamw", "msgdw"] = setting("adamw", "what moves every role but matrix, with its own settings")
    others_lr: float | None = setting(None, "their peak learning rate, before lr_factors; null: optimizer.lr")


@dataclass(frozen=True)
class AlphaControlConfig:
    """What happens to the alphas beside the optimizer's step (pretrain/optimizers/alphas.py)."""

    multiplier: list[float] | None = setting(
        None, "[from, to]: a factor on every alpha that moves from one to the other between multiplier_steps; null: 1"
    )
    multiplier_steps: list[int] | None = setting(
        None, "[first, last]: the last step, from 0, with the factor from, and the first with to", unit="steps"
    )
    bounds: list[float] | None = setting(None, "[low, high] that every alpha is kept within; null: none")
    clip: float | None = setting(None, "largest norm of all alphas' gradients, clipped before train.clip; null: none")


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["msgdw", "adamw", "lion", "muon", "sgd-sai"] = setting(
        "msgdw",
        "msgdw: momentum SGD with decoupled weight decay; adamw; lion; muon: of the matrices, another of the rest; "
        "sgd-sai: momentum SGD whose tensors' learning rates are scaled by their first gradient",
    )
    lr: float = setting(0.2, "peak learning rate")
    weight_decay: float = setting(0.0, "decoupled, multiplied by the scheduled learning rate")
    decay_roles: list[str] | None = setting(
        None, "the roles that decay; null: matrix, embedding and head, those that exist"
    )
    lr_factors: dict[str, float] = setting(dict, "role: factor on the learning rate, e.g. {alpha: 0.1}")
    momentum: float = setting(0.9, "mSGDW, SGD-SaI: share of the last update that stays")
    dampening: float = setting(0.0, "mSGDW: the gradient enters the momentum times 1 - dampening")
    nesterov: bool = setting(False, "mSGDW: Nesterov's variant")
    beta1: float = setting(0.9, "AdamW: decay of the first moment")
    beta2: float = setting(0.95, "AdamW: decay of the second moment")
    eps: float = setting(1e-8, "AdamW, SGD-SaI: added to the denominator")
    lion: LionConfig = setting(LionConfig, "for name lion")
    muon: MuonConfig = setting(MuonConfig, "for name muon")
    alpha: AlphaControlConfig = setting(AlphaControlConfig, "alphas beside the optimizer's step")
    state_dtype: Literal["fp32", "bf16"] = setting("fp32", "storage of the momentum or the moments between steps")
    state_rounding: Literal["stochastic", "nearest"] = setting(
        "stochastic", "bf16 states: stochastic is right on average, nearest loses changes below 1/512 of a value"
    )


@dataclass(frozen=True)
class ScheduleConfig:
    name: Literal["cosine", "linear", "wsd", "constant"] = setting(
        "cosine", "after the warmup; wsd: constant, then a linear decay"
    )
    warmup_steps: int = setting(0, "from zero to the peak", unit="steps")
    warmup: Literal["linear", "quadratic"] = setting("linear", "quadratic: 1 - (1 - t)^2, as in fms-fsdp")
    final_fraction: float = setting(0.1, "last learning rate as a fraction of the peak")
    decay_fraction: float = setting(0.2, "wsd: share of the steps that decay")


@dataclass(frozen=True)
class ParallelConfig:
    engine: Literal["fsdp", "deepspeed"] = setting(
        "fsdp", "what shards the model: PyTorch's FSDP2, where one process is not sharded, or DeepSpeed's ZeRO"
    )
    shard: Literal["full", "grad_op", "hybrid", "replicate"] = setting(
        "full",
        "fsdp; full: parameters are gathered for forward and backward each, gradients reduced every micro-batch; "
        "grad_op: gathered once a micro-batch and reduced once a step, for the memory of whole gradients; hybrid: full "
        "within groups of shard_size ranks, replicated between them; replicate: every rank has everything",
    )
    shard_size: int | None = setting(
        None, "fsdp hybrid: ranks that share one copy of the model; null: those of one node", unit="ranks"
    )
    prefetch: int = setting(
        1, "fsdp: blocks whose parameters are gathered ahead of the one that computes", unit="blocks"
    )
    zero_stage: Literal[0, 1, 2, 3] = setting(
        2, "deepspeed; shares among the ranks: 1 optimizer state, 2 and gradients, 3 and parameters; 0 nothing"
    )
    cpu_offload: bool = setting(
        False, "the CPU's memory holds optimizer state (deepspeed), and parameters and gradients too (fsdp)"
    )
    silence: float = setting(30.0, "a rank not heard from for so long is taken for dead", unit="seconds")
    timeout: float = setting(
        600.0, "a run in which no rank makes progress for so long ends, naming the rank behind", unit="seconds"
    )


@dataclass(frozen=True)
class PrecisionConfig:
    compute: Literal["fp32", "bf16"] = setting(
        "fp32", "of matrix products; master weights, gains, alphas and reductions stay fp32"
    )
    fp8: Literal["none", "tensorwise", "rowwise", "mxfp8"] = setting(
        "none", "the blocks' matrix products in 8 bits, with a scale for each tensor, row, or 32 values"
    )
    fp8_input_scale: Literal["dynamic", "bound"] = setting(
        "dynamic",
        "scale of 8-bit inputs, for fp8 tensorwise; dynamic: of the largest magnitude in the data; bound: where DyT or "
        "its like writes them, of gain + beta, which they never exceed, without a look at the data",
    )
    fp8_skip: list[str] = setting(
        list, "linears that stay in the compute type: names or parts of them, e.g. [attention.out]"
    )
    fp8_skip_first: int = setting(0, "first blocks that stay in the compute type", unit="blocks")
    fp8_skip_last: int = setting(0, "last blocks that stay in the compute type", unit="blocks")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = setting(0, "0: only at the end", unit="steps")
    keep: int = setting(2, "how many of the newest stay", unit="checkpoints")
    keep_every: int | None = setting(None, "those of every such step stay for good", unit="steps")
    asynchronous: bool = setting(False, "write in the background, from a copy in the CPU's memory")


@dataclass(frozen=True)
class ValidateConfig:
    every: int = setting(0, "0: only at the end", unit="steps")
    sequences: int | None = setting(None, "how many of the validation split; null: all", unit="sequences")


@dataclass(frozen=True)
class LogConfig:
    every: int = setting(10, "between two lines of metrics.jsonl", unit="steps")
    tensorboard: bool = setting(True, "write the scalars for TensorBoard too")
    inspect_every: int = setting(0, "between two looks at the inside of the model; 0: never", unit="steps")
    inspect: list[str] | None = setting(
        None,
        "what to look at, some of alpha (and 1/std of its input), saturation, outliers, attention (entropy), "
        "gradients (tails), updates (against weights; holds 4 bytes a parameter of the rank during the step), noise "
        "(scale of the gradient's); null: all that the engine allows",
    )


@dataclass(frozen=True)
class RunConfig:
    """The root: every key of a configuration file stands here or in a section."""

    name: str = setting("run", "of the run's folder")
    runs_dir: str = setting("runs", "where run folders are")
    seed: int = setting(0, "of weights, data order and dropout")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU if there is one")
    model: ModelConfig = setting(ModelConfig, "what is trained")
    data: DataConfig = setting(DataConfig, "what it reads")
    train: TrainConfig = setting(TrainConfig, "how long, and in what portions")
    optimizer: OptimizerConfig = setting(OptimizerConfig, "how weights move")
    schedule: ScheduleConfig = setting(ScheduleConfig, "the learning rate over time")
    parallel: ParallelConfig = setting(ParallelConfig, "how ranks share the work")
    precision: PrecisionConfig = setting(PrecisionConfig, "number formats")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "what survives a stop")
    validate: ValidateConfig = setting(ValidateConfig, "loss on held-out text")
    log: LogConfig = setting(LogConfig, "what is written down")

    def __post_init__(self) -> None:
        if self.data.sequence_length > self.model.context:
            raise ConfigError(
                f"data.sequence_length {self.data.sequence_length} is longer than model.context "
                f"{self.model.context}: lower the first or raise the second"
            )
        if self.train.steps is None and self.train.tokens is None:
            raise ConfigError("train.steps is missing: write how long to train, in train.steps or train.tokens")
        if self.train.steps is not None and self.train.tokens is not None:
            raise ConfigError("train.steps and train.tokens are both given: keep one")
        for key, value in (
            ("train.loss_chunk", self.train.loss_chunk),
            ("train.clip", self.train.clip),
            ("train.skip_norm_sigma", self.train.skip_norm_sigma),
            ("train.rollback.sigma", self.train.rollback.sigma),
            ("train.rollback.after", self.train.rollback.after),
            ("validate.sequences", self.validate.sequences),
            ("parallel.silence", self.parallel.silence),
            ("parallel.timeout", self.parallel.timeout),
        ):
            if value is not None and not value > 0:
                raise ConfigError(f"{key} is {value}: write a positive number")
        if self.train.skip_window < 2:
            raise ConfigError(f"train.skip_window is {self.train.skip_window}: write 2 or more steps")
        if self.train.rollback.times < 0:
            raise ConfigError(f"train.rollback.times is {self.train.rollback.times}: write a number, or 0 for never")
        if self.train.rollback.times and not self.checkpoint.every:
            raise ConfigError("train.rollback needs checkpoints to go back to: write how often, in checkpoint.every")
        if not self.train.z_loss >= 0:
            raise ConfigError(f"train.z_loss is {self.train.z_loss}: write 0 or more")
        for key, every in (
            ("checkpoint.every", self.checkpoint.every),
            ("validate.every", self.validate.every),
            ("log.every", self.log.every),
        ):
            if every < 0:
                raise ConfigError(f"{key} is {every}: write a number of steps, or 0 for only at the end")
        if self.log.inspect_every < 0:
            raise ConfigError(f"log.inspect_every is {self.log.inspect_every}: write a number of steps, or 0 for never")
        for kind in self.log.inspect or ():
            if kind not in INSPECTED:
                raise ConfigError(f"log.inspect: there is no {kind!r}; {nearest(kind, INSPECTED)}")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"name is {self.name!r}: write a name without slashes; runs_dir says where it is")
        if not 0 <= self.seed < 2**32:  # NumPy's seeds are not negative, torch's end at 64 bits times the world size
            raise ConfigError(f"seed is {self.seed}: write a number from 0 to {2**32 - 1}")
