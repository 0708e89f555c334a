"""What someone does with exported folders who has torch and transformers, and nothing of ours.

    python exported_user.py --trust-remote-code FOLDER …

Each FOLDER holds ``text.txt``, the exported ``model``, and in ``expected.safetensors`` what our own code makes of that
text: its ``tokens``, their ``logits``, and how the model goes on greedily (``continued``). The last line written is
JSON, FOLDER -> what came of it. Trainer takes its three steps where accelerate is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

PROMPT = 16  # tokens
LEARNING_RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    found = {str(folder): use(folder, arguments.trust_remote_code) for folder in arguments.folders}
    print(json.dumps(found))


def use(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    expected = load_file(folder / "expected.safetensors")
    tokens = expected["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=trust_remote_code)
    text = (folder / "text.txt").read_text(encoding="utf-8")
    model = load(folder / "model", trust_remote_code)
    with torch.no_grad():
        logits = model(tokens).logits
    length = expected["continued"].shape[1] - PROMPT

    def go_on(**settings: Any) -> torch.Tensor:
        torch.manual_seed(0)
        prompt = tokens[:, :PROMPT]
        whole = {"max_new_tokens": length, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **whole, **settings)

    greedy, sampled = go_on(do_sample=False), go_on(do_sample=True, top_p=0.95)
    model.save_pretrained(folder / "saved")
    with torch.no_grad():
        saved = load(folder / "saved", trust_remote_code)(tokens).logits
    return {
        "difference": (logits - expected["logits"]).abs().max().item(),
        "tokens are ours": tokenizer(text).input_ids == tokens.flatten().tolist(),
        "greedy text is ours": torch.equal(greedy, expected["continued"]),
        "greedy text is the same without a cache": torch.equal(greedy, go_on(do_sample=False, use_cache=False)),
        "sampled text is the same without a cache": torch.equal(
            sampled, go_on(do_sample=True, top_p=0.95, use_cache=False)
        ),
        "sampled text is another than the greedy one": not torch.equal(sampled, greedy),
        "what is saved again is the same": torch.equal(saved, logits),
        "losses": trained(model, tokens, folder) if importlib.util.find_spec("accelerate") else None,
    }


def load(folder: Path, trust_remote_code: bool) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)


def trained(model: Any, tokens: torch.Tensor, folder: Path) -> list[float]:
    """The losses of three steps of transformers' Trainer, each on all rows."""
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=3,
        per_device_train_batch_size=len(rows),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
