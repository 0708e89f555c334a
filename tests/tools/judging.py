"""A run and the same weights as a Hugging Face folder, and tasks of a few lines, for the tests of tools.evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from models import ModelConfig, Transformer
from pretrain.data.tokenizer import Tokenizer, train_tokenizer
from tests.models.test_parity import as_llama
from tests.tools.small_run import WORDS, small_text
from tools.formats.tokenizer import SENTENCEPIECE, hub_files

VOCABULARY = 300  # 256 bytes, and pieces of the few words


def train_pieces(folder: Path) -> Tokenizer:
    path = folder / SENTENCEPIECE
    path.write_bytes(train_tokenizer([small_text(i, 60) for i in range(80)], VOCABULARY))
    return Tokenizer(path)


def write_hub_folder(folder: Path, model: Transformer, config: ModelConfig, tokenizer: Path) -> Path:
    """transformers' own LLaMA with these weights, written by transformers, beside the same tokenizer."""
    as_llama(model, config).save_pretrained(folder)  # type: ignore[operator]
    files, note = hub_files({SENTENCEPIECE: tokenizer.read_bytes()}, config.context)
    assert not note
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_tasks(folder: Path) -> Path:
    """``choose``, three choices of unequal length; ``say``, free generation; ``read``, whole texts. No network."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)

    def draw(count: int) -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=random))

    asked = [
        {"question": draw(2 + i), "choices": [draw(1 + i % 3), draw(2), draw(3) + "!"], "answer": i % 3}
        for i in range(12)
    ]
    write_task(
        folder,
        "choose",
        asked,
        output_type="multiple_choice",
        doc_to_text="Q: {{question}}\nA:",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    write_task(
        folder,
        "say",
        [{"prompt": draw(2 + i), "answer": draw(1)} for i in range(5)],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match"}],
    )
    write_task(
        folder,
        "read",
        [{"text": draw(20 + 30 * i)} for i in range(3)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    return folder


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
