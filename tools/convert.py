"""A model from one format into another.

    python -m tools.convert runs/tiny tiny-hf --to hf --dtype bf16 --verify
    python -m tools.convert SmolLM2-135M runs/smol --to native --data.path data/english --train.steps 1000
    python -m tools.convert runs/llama runs/dyt --to native --plan dyt --alpha measured --seed 1

SOURCE, recognized from what is there, is one of
  a run's folder, for its newest checkpoint, or the folder of a checkpoint in it
  a Hugging Face folder: LlamaForCausalLM, MistralForCausalLM without sliding window, GPT2LMHeadModel, or one made here,
    also as transformers saved it again (to train it on, copy tokenizer.model there too)
  a folder with model.safetensors or model.pt and the run's config.yaml, as --to safetensors and --to torch make it
  a GGUF file of the llama architecture, which is dequantized
  a DeepSpeed checkpoint, a folder that deepspeed.save_checkpoint wrote, with the run's config.yaml in it

DESTINATION is a folder, which must not exist yet. It is there whole at the end, or not at all. A run's folder and a
DeepSpeed checkpoint hold fp32, as training does; the others what the source has, or --dtype.
--fold-gains, for inference: the same logits, but for rounding, without the multiplication by gains. config.yaml says
which gains are in the next linears, and which are left and why; folders of transformers' own classes have gains of one.
--plan NAME, for training on: the norms of another plan, which take over gains and shifts; alphas start by --alpha. The
loss before and after is told. The run begins at step 0, with a fresh optimizer; --seed gives it another order of the
data. --model.sites, --model.first_sites, --model.embedding_scale and --model.alpha.target can follow.
For --to native, any key of a run's configuration can follow; `python -m pretrain DESTINATION/config.yaml` reads them.
"""

from __future__ import annotations

import argparse
import dataclasses
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from models.errors import ConfigError
from pretrain.arguments import Parser
from pretrain.cli import build, merge, parse_overrides
from pretrain.data.manifest import read_manifest
from tools.command import run
from tools.formats import deepspeed, huggingface, native, single, source
from tools.formats.folding import fold, note_in
from tools.formats.lazy import DTYPES, cast
from tools.formats.optimizer import learned
from tools.formats.replanning import replanned
from tools.formats.tokenizer import FAST, SENTENCEPIECE
from tools.formats.verification import compare
from tools.formats.weights import Weights, rounded
from tools.formats.writing import aside, parse_size, progress_bar, require_space

TARGETS = ("hf", "native", "torch", "safetensors", "deepspeed")
_FOR_TRAINING = ("native", "deepspeed")


def main(given: list[str] | None = None) -> None:
    arguments, rest = _parser().parse_known_args(given)
    shard_size = parse_size(arguments.shard_size)
    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    if arguments.to in _FOR_TRAINING and dtype not in (None, torch.float32):
        raise ConfigError(f"--dtype: {arguments.to} holds fp32, as training does; leave it out")
    if arguments.to != "native" and rest:
        raise ConfigError(f"command line: {rest[0]} is not understood with --to {arguments.to}; --help lists what is")
    if arguments.optimizer and arguments.to == "hf":
        raise ConfigError("--optimizer: a Hugging Face folder holds no optimizer state; leave it out")
    if arguments.optimizer and arguments.plan:
        raise ConfigError("--plan: the optimizer's state is of the norms that the model has; leave --optimizer out")
    if arguments.fold_gains and arguments.plan:
        raise ConfigError("--plan is for training on, --fold-gains for inference: convert once with each")
    if arguments.alpha is not None and not arguments.plan:
        raise ConfigError("--alpha says how the alphas of --plan start: write --plan dyt too, or leave it out")
    if arguments.optimizer and arguments.fold_gains:
        raise ConfigError("--fold-gains: the optimizer's state does not fit folded weights; leave --optimizer out")
    try:
        convert(arguments, dtype, shard_size, rest)
    except OSError as error:
        place = error.filename or arguments.destination
        raise ConfigError(f"{place}: {error.strerror}: mend that and start again; nothing was kept") from None


def convert(arguments: argparse.Namespace, dtype: torch.dtype | None, shard_size: int, rest: list[str]) -> None:
    """What the command line asks for; ``rest`` are keys of the run's configuration."""
    destination: Path = arguments.destination
    kind, weights = source.read(
        arguments.source, allow_pickle=arguments.allow_pickle, with_optimizer=arguments.optimizer
    )
    unfolded, folding = None, ""
    if arguments.fold_gains:
        unfolded = weights
        weights, folding = fold(weights, torch.float32 if arguments.to in _FOR_TRAINING else dtype)
    overrides = parse_overrides(rest)
    norms = overrides.pop("model", {}) if arguments.plan else {}
    if arguments.to == "native":
        weights = configured(weights, destination, overrides)
    with aside(destination) as folder:
        if arguments.plan:
            weights = replanned(weights, arguments.plan, arguments.alpha, norms)
        tensors = _as_written(weights, arguments.to, dtype)
        total = sum(tensor.bytes for tensor in [*tensors.values(), *learned(weights.optimizer).values()])
        if arguments.to == "native":
            total = native.size(weights)
        require_space(folder, total)
        with progress_bar(f"{kind} to {arguments.to}", total) as advance:
            notes = list(weights.notes)
            if arguments.to == "native":
                notes += native.write(weights, folder, advance)
            elif arguments.to == "hf":
                notes += huggingface.write(weights, folder, dtype, shard_size, advance)
            elif arguments.to == "deepspeed":
                notes += deepspeed.write(weights, folder, advance)
            else:
                single.write(weights, folder, arguments.to == "torch", dtype, shard_size, advance)
        if folding:
            note_in(folder, folding)
            notes.append(folding)
            if arguments.to in _FOR_TRAINING:
                notes.append("training goes on differently: decay and learning rate now act on the products")
        if arguments.verify:
            notes.append(compare(weights, tensors, folder, unfolded))
    print(f"{destination}: {sum(t.bytes // t.dtype.itemsize for t in tensors.values()):,} parameters, from {kind}")
    for note in notes:
        print(f"  {note}")


def configured(weights: Weights, destination: Path, overrides: dict[str, Any]) -> Weights:
    """As the run in ``destination``, with ``overrides`` of its configuration; ConfigError for one of the model's."""
    if "model" in overrides:
        raise ConfigError("command line: --model keys say what the weights are, which a conversion does not change")
    named = {"name": destination.name, "runs_dir": str(destination.parent)}
    config = build(merge(merge(dataclasses.asdict(weights.config), named), overrides), "command line")
    data = weights.data
    if "path" in overrides.get("data", {}):
        manifest = read_manifest(Path(config.data.path))
        tokenizer = weights.tokenizer.get(SENTENCEPIECE)
        if tokenizer is None and FAST in weights.tokenizer:
            raise ConfigError(
                "--data.path: the model's tokenizer is no sentencepiece model, so it cannot be trained here"
            )
        if tokenizer is not None and sha256(tokenizer).hexdigest() != manifest.tokenizer_sha256:
            raise ConfigError(
                f"{config.data.path} was prepared with another tokenizer than the model's: write "
                "tools.prepare --tokenizer FILE with that one"
            )
        data = {"prepared": manifest.fingerprint}
    return dataclasses.replace(weights, config=config, data=data)


def _as_written(weights: Weights, target: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """The weights by our names in the dtypes in which ``target`` will hold them."""
    if target in _FOR_TRAINING:
        return {name: cast(tensor, torch.float32, name) for name, tensor in weights.model.items()}
    if target == "hf" and dtype is not None and huggingface.stock_architecture(weights.config.model)[0]:
        return {name: cast(tensor, dtype, name) for name, tensor in weights.model.items()}
    return rounded(weights, dtype)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE")
    add("destination", type=Path, metavar="DESTINATION")
    add("--to", required=True, choices=TARGETS)
    add("--dtype", choices=tuple(DTYPES), help="of the weights (default: as they are; native is fp32)")
    add("--shard-size", default="5GB", metavar="SIZE", help="largest safetensors file (default: 5GB)")
    add("--optimizer", action="store_true", help="take the optimizer state along")
    add("--plan", metavar="NAME", help="give the model the norms of this plan, at step 0")
    add("--alpha", metavar="RULE", help="measured (the default), role, width or a number: how alphas of --plan start")
    add("--fold-gains", action="store_true", help="multiply the gains of norms into the linears that read them")
    add("--verify", action="store_true", help="reload both sides and compare their logits on real text")
    add("--allow-pickle", action="store_true", help="read torch files too, with weights_only=True")
    return parser


if __name__ == "__main__":
    run(main)
