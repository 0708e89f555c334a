"""Which settings exclude each other, and why. docs/combinations.md has the table of what was tested together."""

from __future__ import annotations

from collections.abc import Iterator

from models.config import InitConfig
from models.errors import ConfigError
from models.plan import resolve_plan
from pretrain.config import ParallelConfig, RunConfig
from pretrain.counts import derive_counts
from pretrain.distributed import World


def refuse_impossible(config: RunConfig, world: World) -> None:
    """ConfigError with the first pair that cannot be, before anything is built."""
    for message in _impossible(config, world):
        raise ConfigError(message)


def _impossible(config: RunConfig, world: World) -> Iterator[str]:
    parallel, precision, train = config.parallel, config.precision, config.train
    deepspeed = parallel.engine == "deepspeed"
    if deepspeed and parallel.zero_stage == 3 and train.compile:
        yield (
            "train.compile with parallel.zero_stage 3: DeepSpeed gathers parameters by hooks inside the blocks, which "
            "a compiled block would not see: write --parallel.zero_stage 2, or --parallel.engine fsdp"
        )
    if train.cuda_graphs and not train.compile:
        yield "train.cuda_graphs without train.compile: they are of compiled blocks; write --train.compile true"
    if train.cuda_graphs and (world.size > 1 or deepspeed):
        yield (
            "train.cuda_graphs with several ranks, or DeepSpeed: a graph reads parameters where they were when it was "
            "recorded, and these move; write --train.cuda_graphs false"
        )
    if train.cuda_graphs and (count := derive_counts(config, world.size).accumulation) > 1:
        yield (
            f"train.cuda_graphs with {count} micro-batches a step: the next one's graphs write where the gradients of "
            "the last one are; write --train.micro_batch null, or --train.cuda_graphs false"
        )
    if deepspeed and parallel.zero_stage == 0 and parallel.cpu_offload:
        yield "parallel.cpu_offload with parallel.zero_stage 0: DeepSpeed offloads from stage 1 on; write 1, 2 or 3"
    if not deepspeed and parallel.cpu_offload and world.size == 1 and world.device.type == "cuda":
        yield (
            "parallel.cpu_offload with one process: fsdp shards, and offloads, from two ranks on; write "
            "--parallel.engine deepspeed, or --parallel.cpu_offload false"
        )
    name, guarded = config.optimizer.name, train.skip_norm_sigma is not None
    partitioned = deepspeed and parallel.zero_stage > 0
    if partitioned and name in ("muon", "sgd-sai"):
        needs = "whole matrices" if name == "muon" else "each tensor's own first gradient"
        yield (
            f"optimizer.name {name} with parallel.zero_stage {parallel.zero_stage}: it needs {needs}, and ZeRO hands "
            "an optimizer flat pieces of many tensors; write --parallel.engine fsdp, or --parallel.zero_stage 0"
        )
    if partitioned and config.optimizer.alpha.clip is not None:
        yield (
            f"optimizer.alpha.clip with parallel.zero_stage {parallel.zero_stage}: DeepSpeed clips inside its step; "
            "write --parallel.engine fsdp, or --parallel.zero_stage 0"
        )
    if partitioned and guarded:
        yield (
            f"train.skip_norm_sigma with parallel.zero_stage {parallel.zero_stage}: DeepSpeed finds the norm inside "
            "its step; write --parallel.engine fsdp, or --parallel.zero_stage 0"
        )
    if parallel.cpu_offload and guarded:
        yield (
            "train.skip_norm_sigma with parallel.cpu_offload: what the GPU decides would have to wait for the CPU; "
            "write --parallel.cpu_offload false, or --train.skip_norm_sigma null"
        )
    if parallel.shard_size is not None and parallel.shard != "hybrid":
        yield (
            f"parallel.shard_size {parallel.shard_size} with parallel.shard {parallel.shard}: write --parallel.shard "
            "hybrid, or --parallel.shard_size null"
        )
    asked = config.log.inspect if config.log.inspect_every else None
    for kind, why in uninspectable(config, world).items():
        if kind in (asked or ()):
            yield f"log.inspect {kind} with {why}; or take it out of log.inspect"
    weights = resolve_plan(config.model).weights
    if precision.fp8 != "none" and weights != "plain":
        yield (
            f"precision.fp8 {precision.fp8} with linears whose weights are {weights} (model.weights, or the plan's): "
            "8-bit linears take weights as they are; write --precision.fp8 none, or --model.weights plain"
        )
    if precision.fp8_input_scale == "bound" and precision.fp8 not in ("none", "tensorwise"):
        yield (
            f"precision.fp8_input_scale bound with precision.fp8 {precision.fp8}, whose scales are of rows or parts of "
            "them: write --precision.fp8 tensorwise, or --precision.fp8_input_scale dynamic"
        )
    if precision.fp8 != "none" and precision.compute != "bf16" and world.device.type == "cuda":
        yield (
            f"precision.fp8 {precision.fp8} with precision.compute fp32: a GPU's 8-bit products give bf16; write "
            "--precision.compute bf16"
        )


def uninspectable(config: RunConfig, world: World) -> dict[str, str]:
    """Of log.inspect, what this engine cannot show, each with the reason and what to write instead."""
    parallel = config.parallel
    if parallel.engine == "deepspeed":
        noise = "parallel.engine deepspeed: it holds gradients in buffers of its own until the batch is whole; "
        missing = {"noise": noise + "write --parallel.engine fsdp"}
        if parallel.zero_stage > 0:
            why = (
                f"parallel.zero_stage {parallel.zero_stage}: ZeRO hands an optimizer flat pieces of many tensors; "
                "write --parallel.engine fsdp, or --parallel.zero_stage 0"
            )
            missing |= {"gradients": why, "updates": why}
        return missing
    if world.size > 1 and parallel.shard != "full":
        return {
            "noise": f"parallel.shard {parallel.shard}: it adds the ranks' gradients up once a step, and two sizes of "
            "batch are needed; write --parallel.shard full"
        }
    return {}


def unheeded(config: RunConfig, world: World) -> list[str]:
    """A line for each setting that means nothing beside the others, so that none is ignored in silence."""
    default, parallel, precision, init = ParallelConfig(), config.parallel, config.precision, config.model.init
    keys = ("zero_stage",) if parallel.engine == "fsdp" else ("shard", "shard_size", "prefetch")
    other = "deepspeed" if parallel.engine == "fsdp" else "fsdp"
    lines = [
        f"parallel.{key} {getattr(parallel, key)} is of engine {other} and does nothing here"
        for key in keys
        if getattr(parallel, key) != getattr(default, key)
    ]
    if precision.fp8 == "none" and (precision.fp8_skip or precision.fp8_skip_first or precision.fp8_skip_last):
        lines.append("precision.fp8_skip, fp8_skip_first and fp8_skip_last do nothing where precision.fp8 is none")
    if precision.fp8 == "none" and precision.fp8_input_scale != "dynamic":
        lines.append("precision.fp8_input_scale does nothing where precision.fp8 is none")
    if config.train.cuda_graphs and world.device.type == "cpu":
        lines.append("train.cuda_graphs does nothing on a CPU")
    if config.log.inspect is not None and not config.log.inspect_every:
        lines.append("log.inspect does nothing where log.inspect_every is 0")
    rule = resolve_plan(config.model).init
    if rule != "standard" and (init.std, init.depth_scaled_output) != (InitConfig().std, True):
        lines.append(f"model.init.std and depth_scaled_output are of rule standard; here the rule is {rule}")
    return lines
