"""``python -m tools.evaluate`` on tasks and on Hugging Face folders: a run and its export agree, with no network.

fp32 on both sides, in different orders: metrics that count are equal, likelihoods agree to 1e-5.
"""

from __future__ import annotations

import importlib.util
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers.dynamic_module_utils

from models import ConfigError
from tests.models.building import scrambled, tiny
from tests.tools.judging import VOCABULARY, train_pieces, write_hub_folder, write_task, write_tasks
from tests.tools.small_run import prepare_small, small_config, small_text, train_small
from tools import evaluate
from tools.harness import record, tasks
from tools.harness.native import NativeLM
from tools.loading import load_run

PAPER = {
    *("anli_r1", "anli_r2", "anli_r3", "arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa"),
    *("record", "rte", "truthfulqa_mc1", "truthfulqa_mc2", "wic", "winogrande"),
}


class Places:
    """A trained run, its weights as a Hugging Face folder, and a folder with tasks."""

    def __init__(self, folder: Path) -> None:
        config = small_config(folder, prepare_small(folder))
        config = replace(config, model=replace(config.model, plan="llama", context=64))
        _, self.run = train_small(config)
        trained = load_run(self.run, torch.device("cpu"))
        self.hub = write_hub_folder(folder / "hub", trained.model, trained.config.model, self.run / "tokenizer.model")
        self.tasks = write_tasks(folder / "tasks")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "hf"))
        yield Places(folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"{address} was called")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def call(monkeypatch: pytest.MonkeyPatch, model: Path, *options: object) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", str(model), *map(str, options)])
    evaluate.main()


def test_a_run_and_its_export_get_the_same_results(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--tasks", "choose,say,read", "--include-path", places.tasks, "--batch-size", 5]
    found = {}
    for model in (places.run, places.hub):
        call(monkeypatch, model, *asked, "--json", tmp_path / "results.json")
        found[model] = json.loads((tmp_path / "results.json").read_text())
        printed = capsys.readouterr().out
        rows = [line.replace("│", " ").split() for line in printed.splitlines()]
        entry = found[model]["choose"]
        values = [f"{entry[key]:.4f}" for key in ("acc,none", "acc_stderr,none")]
        assert ["choose", "0", "12", "acc", values[0], "±", values[1]] in rows
        assert ["read", "0", "3", "bits_per_byte", f"{found[model]['read']['bits_per_byte,none']:.4f}"] in rows
    ours, theirs = found[places.run], found[places.hub]
    assert ours.keys() == theirs.keys() == {"choose", "say", "read"}
    for name, entry in ours.items():
        metrics = {key: value for key, value in entry.items() if "," in key and value != "N/A"}
        assert metrics == pytest.approx({key: theirs[name][key] for key in metrics}, rel=1e-5), name
    assert 0 < ours["choose"]["acc,none"] < 1
    share = ours["choose"]["acc,none"]
    assert ours["choose"]["acc_stderr,none"] == pytest.approx((share * (1 - share) / 11) ** 0.5)  # of 12 documents
    settings = {"documents": 12, "num_fewshot": 0, "limit": None, "step": 4, "precision": "fp32"}
    assert settings.items() <= ours["choose"].items()
    assert theirs["choose"]["precision"] == "fp32"


def test_a_runs_results_gather(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, places.run)
    call(monkeypatch, places.run, "--tasks", "choose", "--include-path", places.tasks, "--limit", 5, "--bf16")
    results = json.loads((places.run / "evaluation.json").read_text())
    assert results.keys() == {"validation", "choose"}
    assert {"documents": 5, "limit": 5, "precision": "bf16"}.items() <= results["choose"].items()


def test_a_text_has_the_same_loss(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, name in enumerate(("a.txt", "b.txt")):
        (tmp_path / name).write_text(small_text(i, 90) + " – Käfer\n")
    output = tmp_path / "results.json"
    found = []
    for model in (places.run, places.hub):
        options = ["--text", tmp_path / "a.txt", tmp_path / "b.txt", "--length", 48, "--stride", 20, "--json", output]
        call(monkeypatch, model, *options)
        (entry,) = json.loads(output.read_text()).values()
        found.append(entry)
    ours, theirs = found
    assert {"sequence_length": 48, "stride": 20}.items() <= ours.items()
    for key in ("loss", "perplexity", "bits_per_byte", "targets", "bytes"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    assert not (places.hub / "evaluation.json").exists()


def test_a_folders_own_code_runs_only_if_trusted(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder, ran = tmp_path / "own", tmp_path / "ran"
    folder.mkdir()
    for path in places.hub.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    described = json.loads((folder / "config.json").read_text())
    described |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "own_code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    (tmp_path / "a.txt").write_text("the cat sat on a mat")
    options = ["--text", tmp_path / "a.txt", "--json", tmp_path / "results.json"]
    with pytest.raises(ConfigError, match="write --trust-remote-code"):
        call(monkeypatch, folder, *options)
    assert not ran.exists()
    call(monkeypatch, folder, *options, "--trust-remote-code")
    assert ran.exists()
    own = json.loads((tmp_path / "results.json").read_text())
    call(monkeypatch, places.hub, *options)
    assert own == json.loads((tmp_path / "results.json").read_text())


@pytest.fixture(scope="module")
def stock() -> tasks.Tasks:
    """Made from all of lm_eval's files, which takes some seconds to read."""
    return tasks.open_tasks([*PAPER, "mmlu", "mmlu_pro", "dyt-paper"], None, 256)


def test_an_unknown_name_gets_the_nearest(stock: tasks.Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "Tasks", lambda *_, **__: stock)
    for name, near in (("dyt-papr", "dyt-paper"), ("mmlu_pr0", "mmlu_pro"), ("ARC_easy", "arc_easy")):
        with pytest.raises(ConfigError, match=f"there is no {name}, did you mean '{near}'") as raised:
            tasks.open_tasks(["mmlu", name], None, 256)
        assert "\n" not in str(raised.value)


def test_the_papers_tasks_and_their_mean(stock: tasks.Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock tasks on two made-up documents each, in place of those that a network would bring."""
    monkeypatch.setattr(datasets, "load_dataset", made_up)
    model = scrambled(tiny(plan="llama", vocab_size=VOCABULARY, context=256))
    lm = NativeLM(model, train_pieces(tmp_path), batch_size=16)
    found = tasks.entries(tasks.ask(lm, ["dyt-paper"], stock, None))
    assert found.keys() == {"dyt-paper", *PAPER}
    scores = [found[name]["acc,none"] for name in PAPER]
    assert len(set(scores)) > 1
    assert found["record"]["acc,none"] == found["record"]["em,none"]
    assert found["dyt-paper"]["acc,none"] == pytest.approx(sum(scores) / 15)
    errors = [found[name]["acc_stderr,none"] for name in PAPER]
    assert found["dyt-paper"]["acc_stderr,none"] == pytest.approx(sum(e**2 for e in errors) ** 0.5 / 15)
    assert {found[name]["num_fewshot"] for name in PAPER} == {0}


def test_record_is_scored_as_squad_is() -> None:
    doc = {"entities": ["the Big Dog", "a mat"], "answers": ["dog!", "old big cat"]}
    # "big dog" against "dog": of two words one is right, of one word all are: 2 * 1/2 * 1 / (1/2 + 1)
    assert record.scores(doc, [(-1.0, False), (-2.0, True)]) == {"f1": pytest.approx(2 / 3), "em": 0, "acc": 0}
    assert record.scores(doc, [(-2.0, False), (-1.0, True)]) == {"f1": 0, "em": 0, "acc": 0}
    doc["answers"].append("big, dog")
    assert record.scores(doc, [(-1.0, False), (-2.0, True)]) == {"f1": 1, "em": 1, "acc": 1}
    doc = {"passage": "text\n@highlight\none\n@highlight\ntwo", "query": "the @placeholder", **doc}
    assert record.prompt(doc) == "text\n\n  - one.\n  - two.\n"
    assert record.choices(doc) == ["  - the the Big Dog", "  - the a mat"]
    assert record.target(doc) == "  - the dog!"


def made_up(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Two documents for every split of the dataset."""
    fields: dict[str, Any] = {
        "facebook/anli": {"premise": "the cat sat", "hypothesis": "a cat", "label": [0, 2]},
        "allenai/ai2_arc": {
            "question": "what sat?",
            "choices": {"text": ["the cat", "a mat"], "label": ["A", "B"]},
            "answerKey": ["A", "B"],
        },
        "boolq": {"passage": "the dog ran", "question": "did it run", "label": [1, 0]},
        "record": {
            "passage": "the cat and the dog ran\n@highlight\nthe cat ran",
            "query": "then the @placeholder sat",
            "entities": ["cat", "dog"],
            "answers": [["cat"], ["dog"]],
        },
        "wic": {"word": "cat", "sentence1": "a cat ran", "sentence2": "the cat sat", "start1": 2, "end1": 5}
        | {"label": [0, 1]},
        "rte": {"sentence1": "the dog ran", "sentence2": "a dog ran", "label": [0, 1]},
        "hellaswag": {
            "activity_label": "sitting",
            "ctx_a": "the cat sat",
            "ctx_b": "then the dog",
            "endings": ["ran", "sat on a mat", "and", "on"],
            "label": ["0", "1"],
        },
        "openbookqa": {
            "question_stem": "the cat sat on",
            "choices": {"text": ["a mat", "a dog", "the", "and"], "label": ["A", "B", "C", "D"]},
            "answerKey": ["A", "C"],
        },
        "piqa": {"goal": "sit", "sol1": "on a mat", "sol2": "on the dog", "label": [0, 1]},
        "truthful_qa": {
            "question": "what sat?",
            "mc1_targets": {"choices": ["the cat", "a dog"], "labels": [1, 0]},
            "mc2_targets": {"choices": ["the cat", "a cat", "a dog"], "labels": [1, 1, 0]},
        },
        "winogrande": {"sentence": "the cat and the dog sat, then _ ran", "option1": "the cat", "option2": "the dog"}
        | {"answer": ["1", "2"]},
    }
    key = next(k for k in fields if k in (path, name) or path.endswith(k))
    documents = [
        {field: value[i] if field in ("label", "answers", "answerKey", "answer") else value for field, value in
         fields[key].items()}
        for i in range(2)
    ]  # fmt: skip
    splits = ("train", "validation", "test", *(f"{kind}_r{i}" for kind in ("train", "dev", "test") for i in (1, 2, 3)))
    return datasets.DatasetDict({split: datasets.Dataset.from_list(documents) for split in splits})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", " ,"], "--tasks names none"),
        (["--tasks", "choose", "--limit", 0], "--limit is 0"),
        (["--tasks", "choose", "--batch-size", -1], "--batch-size is -1"),
        (["--tasks", "choose", "--stride", 3], "--stride and --length are for texts"),
        (["--limit", 3], "--limit is for --tasks"),
        (["--tasks", "choose", "--include-path", "nowhere"], "--include-path nowhere is not there"),
        (["--tasks", "long"], "long generates up to 256 tokens, .* context of 64"),
        (["--tasks", "beams"], "generation with num_beams 3"),
        (["--tasks", "lost"], r"--tasks lost: cannot be loaded: .*none\.jsonl"),
        (["--tasks", "broken"], "--tasks broken: cannot be loaded: "),
        (["--text", "a.txt", "--length", 65], "cannot read a.txt|--length is 65: write a number from 1"),
    ],
)
def test_mistakes_are_named(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], message: str
) -> None:
    generation = {"output_type": "generate_until", "doc_to_text": "{{a}}", "doc_to_target": "{{a}}"}
    write_task(tmp_path, "long", [{"a": "b"}], **generation)
    write_task(tmp_path, "beams", [{"a": "b"}], **generation, generation_kwargs={"num_beams": 3, "max_gen_toks": 2})
    write_task(tmp_path, "lost", [{"a": "b"}], **generation)
    (tmp_path / "lost.yaml").write_text((tmp_path / "lost.yaml").read_text().replace("lost.jsonl", "none.jsonl"))
    write_task(tmp_path, "broken", [{"a": "b"}], **generation)
    (tmp_path / "broken.jsonl").write_text("{")
    if "--tasks" in options and "--include-path" not in options:
        options = [*options, "--include-path", places.tasks if options[1] == "choose" else tmp_path]
    with pytest.raises(ConfigError, match=message) as raised:
        call(monkeypatch, places.run, *options)
    assert "\n" not in str(raised.value)


def test_mistakes_with_folders_are_named(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is a Hugging Face folder, which has no splits"):
        call(monkeypatch, places.hub)
    with pytest.raises(ConfigError, match="nowhere is not there"):
        call(monkeypatch, tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="transformers cannot load it") as raised:
        call(monkeypatch, tmp_path, "--text", "a.txt")
    assert "\n" not in str(raised.value)


def test_without_lm_eval_it_says_what_to_install(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"--tasks needs lm_eval: pip install .*\[evaluate\]"):
        call(monkeypatch, places.run, "--tasks", "choose")
