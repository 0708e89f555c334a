"""How good a model is: bits per byte of a text, or lm-evaluation-harness's tasks.

    python -m tools.evaluate runs/tiny --split test
    python -m tools.evaluate runs/tiny --text novel.txt --stride 64
    python -m tools.evaluate runs/tiny --tasks dyt-paper --batch-size 16 --device cuda
    python -m tools.evaluate exported/tiny --tasks mine --include-path my-tasks --json results.json

MODEL is a run's folder, for its newest checkpoint, or a Hugging Face folder. On text, windows (of a run's sequence
length) begin every --stride tokens, and a token is scored in the first window that reaches it, so that each has at
least length - stride tokens before it, save at the start of the text. With a stride of the sequence length this is what
training reports as val_loss. Tasks are lm_eval's, among them mmlu and mmlu_pro; dyt-paper, the 15 of the DyT paper; and
YAML files in the folder --include-path. A run and the folder that tools.convert makes of it get the same results, save
a model from elsewhere whose tokenizer puts a BOS before every text: in a run that is left out, so judge the folder.
A run's results gather in evaluation.json in its folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from models import ConfigError
from pretrain.arguments import Parser
from pretrain.batch import document_numbers
from pretrain.data.manifest import open_split, read_manifest, sha256_of
from pretrain.data.source import TokenArray
from pretrain.files import write_atomically
from tools.command import require_device, run
from tools.harness import hub
from tools.harness.text import HeldOut, Scored, read_texts, score
from tools.loading import TrainedRun, load_run

_AT_ONCE = 8192  # tokens: enough to keep a device busy, few enough for a laptop

Results = dict[str, dict[str, Any]]


def main() -> None:
    arguments = _parser().parse_args()
    _check(arguments)
    folder: Path = arguments.model
    device = torch.device(arguments.device)
    output: Path | None = arguments.json
    model: hub.HubModel | TrainedRun
    earlier: Results = {}
    if hub.is_hub_folder(folder):
        if not arguments.tasks and not arguments.text:
            raise ConfigError(f"{folder} is a Hugging Face folder, which has no splits: write --text FILE or --tasks")
        model = hub.load_hub(folder, device, trust_remote_code=arguments.trust_remote_code)
    else:
        model = load_run(folder, device)
        if output is None:
            output = folder / "evaluation.json"
            earlier = read_results(output)
    results = ask(model, arguments) if arguments.tasks else score_text(model, arguments)
    if output is not None:
        try:
            write_atomically(output, json.dumps({**earlier, **results}, indent=2).encode() + b"\n")
        except OSError as error:
            raise ConfigError(f"cannot write {output}: {error.strerror}") from None


def score_text(model: hub.HubModel | TrainedRun, arguments: argparse.Namespace) -> Results:
    """The loss on the text that the command line names, printed too."""
    by = hub.scored(model, bf16=arguments.bf16) if isinstance(model, hub.HubModel) else scored(model, arguments.bf16)
    length = by.length if arguments.length is None else arguments.length
    stride = max(1, length // 2) if arguments.stride is None else arguments.stride
    if not 1 <= length <= by.context:
        raise ConfigError(f"--length is {length}: write a number from 1 to the model's context, {by.context}")
    if not 1 <= stride <= length:
        raise ConfigError(f"--stride is {stride}: write a number from 1 to the sequence length, {length}")
    if arguments.text:
        text = read_texts(arguments.text, by)
    else:
        assert isinstance(model, TrainedRun), "a Hugging Face folder without --text was refused"
        text = prepared_split(model, arguments.model, arguments.split)
    found = score(by, text, length=length, stride=stride)
    settings = {**by.settings, "sequence_length": length, "stride": stride}
    step = f"step {by.settings['step']}, " if "step" in by.settings else ""
    print(
        f"{text.name}: loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte, perplexity "
        f"{found.perplexity:.2f}, {found.targets:,} tokens, {step}stride {stride} of {length}"
    )
    return {text.name: {**found._asdict(), "bytes": text.bytes, **settings}}


def scored(trained: TrainedRun, bf16: bool) -> Scored:
    """A run's model as training validates it, in bf16 also if it was trained otherwise."""
    config, tokenizer, model = trained.config, trained.tokenizer, trained.model
    bf16 = bf16 or config.precision.compute == "bf16"

    def nats(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            documents = document_numbers(inputs, tokenizer.eos) if config.data.document_mask else None
            total: Tensor = model(inputs, targets, documents, loss_chunk=config.train.loss_chunk)[1]
        return total

    return Scored(
        nats,
        tokenizer.encode,
        tokenizer.eos,
        tokenizer.eos,
        model.embedding.weight.device,
        length=config.data.sequence_length,
        context=config.model.context,
        at_once=_AT_ONCE,
        settings={"step": trained.step, "precision": "bf16" if bf16 else "fp32"},
    )


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


def ask(model: hub.HubModel | TrainedRun, arguments: argparse.Namespace) -> Results:
    """The results on the tasks that the command line names, printed too as a table with standard errors."""
    from tools.harness import tasks
    from tools.harness.native import NativeLM

    how = {"batch_size": arguments.batch_size, "bf16": arguments.bf16}
    if isinstance(model, hub.HubModel):
        lm = hub.as_lm(model, **how)
        settings: dict[str, Any] = {"precision": "bf16" if arguments.bf16 else hub.precision(model)}
    else:
        lm = NativeLM(model.model, model.tokenizer, **how)
        settings = {"step": model.step, "precision": "bf16" if arguments.bf16 else "fp32"}
    names = list(dict.fromkeys(name.strip() for name in arguments.tasks.split(",") if name.strip()))
    known = tasks.open_tasks(names, arguments.include_path, lm.max_length)
    found = tasks.entries(tasks.ask(lm, names, known, arguments.limit))
    Console().print(tasks.table(found))
    return {name: {**entry, "limit": arguments.limit, **settings} for name, entry in found.items()}


def read_results(path: Path) -> Results:
    """What earlier evaluations of the run found, by the name of the text or task; empty if there were none."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        results = None
    if not isinstance(results, dict):
        raise ConfigError(f"{path} is damaged: move it away")
    return results


def _check(arguments: argparse.Namespace) -> None:
    require_device(arguments.device)
    if not arguments.model.is_dir():
        raise ConfigError(f"{arguments.model} is not there: give a run's folder or a Hugging Face folder")
    for option in ("limit", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {value}: write a positive number")
    if arguments.tasks is None:
        for option in ("limit", "include_path"):
            if getattr(arguments, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} is for --tasks: write these too, or leave it out")
    elif not arguments.tasks.strip(" ,"):
        raise ConfigError("--tasks names none: write names with commas between them")
    elif arguments.stride is not None or arguments.length is not None:
        raise ConfigError("--stride and --length are for texts: leave them out with --tasks")
    elif importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm_eval: pip install --constraint constraints.txt '.[evaluate]'")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run's folder or a Hugging Face folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--split", default="validation", help="of the run's prepared data (default validation)")
    what.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="plain text files instead, a document each")
    what.add_argument("--tasks", metavar="A,B,…", help="tasks, tags and groups of lm_eval instead")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows of text (default: half of the length)"
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens in a window of text (default: the run's sequence length; of a Hugging Face folder its context, at "
        "most 2048)",
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="folder with more tasks as lm_eval's YAML files"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first documents of each task")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="of tasks (default 8)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default cpu)")
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bf16 (a run's texts always are if it was trained so)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the results go (default: a run's evaluation.json, added to it)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a Hugging Face folder run the Python code in it"
    )
    return parser


if __name__ == "__main__":
    run(main)
