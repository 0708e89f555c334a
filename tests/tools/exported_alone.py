"""Exported folders in a fresh virtual environment that has torch and transformers alone.

    python -m tests.tools.exported_alone

A dnt and a dyt model whose every parameter is random are exported. What exported_user.py finds there, first without
accelerate and then with it for transformers' Trainer, is printed; the exit code is 1 if it is not what our own code
says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from models import Transformer
from models.generation import sample
from pretrain.data import Tokenizer, austen
from tests.models.building import tiny
from tests.runs import REPOSITORY, prepare_corpus
from tests.tools.converting import run_convert, write_run
from tests.tools.exported_user import LEARNING_RATE, PROMPT

PLANS = ("dnt", "dyt")
ROWS, LENGTH, ADDED = 4, 48, 24  # tokens
LOGITS = 1e-5  # fp32 sums of some units in another order
LOSSES = 1e-5  # the same after two steps of AdamW
_USER = Path(__file__).with_name("exported_user.py")


def make(folder: Path, plan: str, corpus: Path) -> Path:
    """What exported_user.py wants of a folder. The vocabulary is padded beyond the tokenizer's pieces."""
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    text = austen.novels()["Persuasion"][:4000]
    count = ROWS * LENGTH
    while len(tokenizer.encode(text)) > count:
        text = text[:-1]
    tokens = torch.tensor(tokenizer.encode(text)).view(ROWS, LENGTH)
    config = tiny(plan=plan, vocab_size=tokenizer.size + 8, context=64)
    model = write_run(folder / "run", config, tokenizer=tokenizer.path.read_bytes()).eval()
    run_convert(folder / "run", folder / "model", "hf")
    prompts = tokens[:, :PROMPT].tolist()
    steps = sample(model, prompts, ADDED, temperature=0, pieces=tokenizer.size)
    continued = torch.cat([tokens[:, :PROMPT], torch.tensor(list(steps)).T], dim=1)
    with torch.no_grad():
        logits = model(tokens)
    expected = {"tokens": tokens, "logits": logits, "continued": continued, "losses": _losses(model, tokens)}
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


def _losses(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Of three steps with the defaults of transformers' Trainer: AdamW without decay, gradients clipped to 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for _ in range(3):
        loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())[0] / tokens[:, 1:].numel()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return torch.tensor(losses)


def use(folders: Sequence[Path], python: Sequence[str | Path], **environment: str) -> dict[str, dict[str, Any]]:
    """What exported_user.py finds: plan -> what was asked -> the answer. ``python`` is the interpreter to ask."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bare |= {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folders[0] / "modules")}
    done = subprocess.run(
        [*python, _USER, "--trust-remote-code", *folders],
        cwd=folders[0],
        env=bare | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return {folder.name: found[str(folder)] for folder in folders}


def broken(folder: Path, found: Mapping[str, Any], *, trained: bool) -> list[str]:
    """What of it is not as it should be."""
    wrong = [question for question, answer in found.items() if answer is False]
    if not found["difference"] <= LOGITS:
        wrong.append(f"logits differ by {found['difference']}")
    if trained:
        expected = load_file(folder / "expected.safetensors")["losses"]
        losses = torch.tensor(found["losses"])
        if losses.shape != expected.shape or not (losses - expected).abs().max() <= LOSSES:
            wrong.append(f"Trainer's losses are {found['losses']}, ours {expected.tolist()}")
        if not expected[0] > expected[1] > expected[2]:
            wrong.append(f"losses do not fall: {expected.tolist()}")
    elif found["losses"] is not None:
        wrong.append("accelerate is there")
    return [f"{folder.name}: {line}" for line in wrong]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        corpus = prepare_corpus(place / "corpus")
        folders = [make(place / plan, plan, corpus) for plan in PLANS]
        python = place / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
        wrong = []
        for packages in (("torch", "transformers"), ("accelerate",)):
            install = [python, "-m", "pip", "install", "--constraint", REPOSITORY / "constraints.txt", *packages]
            subprocess.run(install, cwd=place, check=True)
            for folder, found in zip(folders, use(folders, [python]).values(), strict=True):
                print(f"{folder.name}: {json.dumps(found)}", flush=True)
                wrong += broken(folder, found, trained=packages == ("accelerate",))
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
