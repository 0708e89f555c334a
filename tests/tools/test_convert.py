"""Conversions between a run's folder and Hugging Face folders, against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from models import ConfigError
from pretrain.cli import load as load_config
from pretrain.data import Tokenizer, austen
from pretrain.trainer import Outcome, Trainer
from tests.models.building import tiny, tokens
from tests.runs import metrics, write_config
from tests.tools.converting import assert_bitwise, model_of, run_convert, write_run
from tests.tools.small_run import WORLD
from tools.exported.modeling_equipoise import EquipoiseForCausalLM
from tools.formats import huggingface, source
from tools.formats.verification import transformer
from tools.loading import load_run

# fp32 and logits of order 1: the two sum in different orders and no more.
EXACT = {"atol": 1e-5, "rtol": 1e-5}

LLAMA = {"plan": "llama", "trunk": "llama"}
GPT = {"plan": "gpt", "trunk": "gpt", "ffn_width": None}
STOCK: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tied": True},
    "llama grouped": {**LLAMA, "kv_heads": 2, "norm_eps": 1e-3, "rope_theta": 500.0},
    "llama one kv head, biases": {**LLAMA, "kv_heads": 1, "bias": True, "tied": True},
    "llama odd vocabulary, odd ffn": {**LLAMA, "vocab_size": 57, "ffn_width": 43},
    "llama eps in sites": {
        **LLAMA,
        "sites": {s: {"function": "rmsnorm", "eps": 0.01} for s in ("attn_in", "mlp_in", "final")},
    },
    "gpt": {**GPT, "bias": True},
    "gpt untied": {**GPT, "bias": True, "tied": False, "norm_eps": 1e-3},
    "gpt without biases": {**GPT, "bias": False, "vocab_size": 59},
    "gpt biases in norms alone": {**GPT, "sites": {"final": {"function": "layernorm", "bias": True}}},
}


def by_hand(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    """Greedy, from whole forward passes of our model."""
    for _ in range(count):
        prompt = torch.cat([prompt, model(prompt)[:, -1:].argmax(dim=-1)], dim=1)
    return prompt


def greedy(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    """transformers' own loop, with its cache."""
    mask = torch.ones_like(prompt)  # it would take token 0 for padding
    return model.generate(  # type: ignore[operator, no-any-return]
        prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("shape", STOCK.values(), ids=STOCK)
@torch.no_grad()
def test_transformers_computes_what_we_export(shape: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(**shape)
    ours = write_run(tmp_path / "run", config)
    theirs = load(run_convert(tmp_path / "run", tmp_path / "hf", "hf"))
    assert type(theirs) is (GPT2LMHeadModel if config.trunk == "gpt" else LlamaForCausalLM)
    text = tokens(vocabulary=config.vocabulary)
    expected = ours(text)
    assert expected.std() > 0.1
    torch.testing.assert_close(theirs(text).logits, expected, **EXACT)
    prompt = text[:, :6]
    assert by_hand(ours, prompt, 10).equal(greedy(theirs, prompt, 10))
    # and back, with the configuration that it came from
    run_convert(tmp_path / "hf", tmp_path / "back", "native")
    assert_bitwise(model_of(tmp_path / "back"), ours.state_dict())


def foreign(kind: str) -> nn.Module:
    """A model of transformers' with random weights in all its parameters, as no run of ours would configure it."""
    llama: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 32,
        "attn_implementation": "eager",
    }
    theta = {"rope_type": "default", "rope_theta": 12345.0}
    torch.manual_seed(1)
    model: nn.Module
    if kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**llama, sliding_window=None, rope_parameters=theta))
    elif kind.startswith("llama"):
        biases = {"attention_bias": "biases" in kind, "mlp_bias": "biases" in kind}
        tied = {"tie_word_embeddings": "tied" in kind}
        model = LlamaForCausalLM(LlamaConfig(**llama, **biases, **tied, rope_parameters=theta))
    else:
        sizes = {"vocab_size": 67, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 32}
        config = GPT2Config(**sizes, tie_word_embeddings="untied" not in kind, attn_implementation="eager")
        model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter.shape[1] if parameter.ndim == 2 else 4
            parameter.copy_(torch.randn(parameter.shape) / fan**0.5 + (parameter.ndim == 1))
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "llama tied", "llama biases", "mistral", "gpt2", "gpt2 untied"])
@torch.no_grad()
def test_we_compute_what_transformers_exports(kind: str, tmp_path: Path) -> None:
    theirs = foreign(kind)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")  # type: ignore[operator]
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    run_convert(tmp_path / "theirs", tmp_path / "run", "native")
    _, read = source.read(tmp_path / "run", allow_pickle=False, with_optimizer=False)
    ours = transformer(read.config.model, read.model)
    text = tokens(vocabulary=67, length=24)
    torch.testing.assert_close(ours(text), theirs(text).logits, **EXACT)
    prompt = text[:, :8]
    assert by_hand(ours, prompt, 16).equal(greedy(theirs, prompt, 16))
    # and what is exported again has the same tensors
    run_convert(tmp_path / "run", tmp_path / "again", "hf")
    assert_bitwise(dict(load(tmp_path / "again").named_parameters()), dict(theirs.named_parameters()))


def test_pickled_weights_are_read_if_asked(tmp_path: Path) -> None:
    theirs = foreign("llama tied")
    theirs.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    (tmp_path / "theirs" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")  # the tied head a second time
    with pytest.raises(ConfigError, match=r"pytorch_model.bin is a pickle.*--allow-pickle"):
        run_convert(tmp_path / "theirs", tmp_path / "refused", "native")
    run_convert(tmp_path / "theirs", tmp_path / "run", "native", "--allow-pickle")
    run_convert(tmp_path / "run", tmp_path / "again", "hf")
    assert_bitwise(dict(load(tmp_path / "again").named_parameters()), dict(theirs.named_parameters()))


OBSTACLES: list[tuple[dict[str, Any], str]] = [
    ({"plan": "dnt"}, "site embed has rmsnorm"),
    ({**LLAMA, "sites": {"mlp_mid": "rmsnorm"}}, "site mlp_mid has rmsnorm"),
    ({**LLAMA, "sites": {"final": "none"}}, "site final has nothing"),
    ({**LLAMA, "sites": {"final": {"function": "rmsnorm", "eps": 0.5}}}, "one eps"),
    ({**LLAMA, "embedding_scale": "learned"}, "embedding_scale"),
    ({**GPT, "kv_heads": 2}, "kv_heads"),
    ({**GPT, "trunk": "llama"}, "site attn_in has layernorm"),
    ({**LLAMA, "trunk": "gpt"}, "site attn_in has rmsnorm"),
]


@pytest.mark.parametrize(("shape", "reason"), OBSTACLES, ids=[reason for _, reason in OBSTACLES])
def test_what_no_class_of_transformers_computes_has_its_own_code(
    shape: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(**shape)
    assert reason in huggingface.stock_architecture(config)[1]
    ours = write_run(tmp_path / "run", config)
    run_convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert reason in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "equipoise"
    assert (tmp_path / "hf" / "modeling_equipoise.py").is_file()
    run_convert(tmp_path / "hf", tmp_path / "back", "native")
    assert_bitwise(model_of(tmp_path / "back"), ours.state_dict())


@pytest.fixture(scope="module")
def sentencepiece_model(corpus: Path) -> bytes:
    return (corpus / "tokenizer.model").read_bytes()


def test_the_tokenizer_goes_along(sentencepiece_model: bytes, corpus: Path, tmp_path: Path) -> None:
    """What AutoTokenizer makes of the folder gives the ids of our own tokenizer, and the text back, on text that the
    conversion itself has not tried."""
    write_run(tmp_path / "run", tiny(**LLAMA, vocab_size=512, context=64), tokenizer=sentencepiece_model)
    run_convert(tmp_path / "run", tmp_path / "hf", "hf")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(corpus / "tokenizer.model")
    odd = (
        "A\u2581mark, \u2581\u2581 two </s> <s> <0x41>\n\n  ünïcödé 漢字 🙂🏳️‍🌈 \u0300\u200b\ufeff\x00\x7f\U0010ffff   "
    )
    for text in (odd, "", " ", austen.novels()["Persuasion"][:50_000], "a" * 50, "\u2581"):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eos
    assert theirs.decode([ours.eos], skip_special_tokens=True) == ""
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == ours.eos
    # The files made for transformers do not come back as the model's own.
    run_convert(tmp_path / "hf", tmp_path / "back", "native")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "tokenizer.model",
    ]
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == sentencepiece_model


@pytest.mark.parametrize("shape", [LLAMA, GPT, {"plan": "dnt"}], ids=["llama", "gpt2", "own code"])
@pytest.mark.parametrize("padding", [0, 512])
@torch.no_grad()
def test_what_no_piece_has_is_not_drawn(
    shape: dict[str, Any], padding: int, sentencepiece_model: bytes, tmp_path: Path
) -> None:
    """Half of the vocabulary is padding here, so that without the list a text of 40 tokens had some for certain."""
    write_run(tmp_path / "run", tiny(**shape, vocab_size=512 + padding, context=64), tokenizer=sentencepiece_model)
    folder = run_convert(tmp_path / "run", tmp_path / "hf", "hf")
    listed = json.loads((folder / "generation_config.json").read_text()).get("suppress_tokens")
    assert listed == (list(range(512, 1024)) if padding else None)
    own = json.loads((folder / "config.json").read_text())["model_type"] == "equipoise"
    model = (EquipoiseForCausalLM if own else AutoModelForCausalLM).from_pretrained(folder).eval()
    prompt = tokens(vocabulary=512, length=8)
    settings = {"attention_mask": torch.ones_like(prompt), "min_new_tokens": 40, "max_new_tokens": 40}
    for choice in ({"do_sample": False}, {"do_sample": True, "temperature": 2.0}):
        torch.manual_seed(0)
        assert model.generate(prompt, pad_token_id=0, **settings, **choice).max() < 512
        if padding:
            assert model.generate(prompt, pad_token_id=0, suppress_tokens=None, **settings, **choice).max() >= 512


def test_a_tokenizer_of_another_kind_is_kept_as_it_is(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It serves the tools that look at a run, and goes back as it came; to train with it is refused."""
    text = austen.novels()["Emma"][:20_000]
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator([text], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    write_run(tmp_path / "first", tiny(**LLAMA, vocab_size=300))
    theirs = run_convert(tmp_path / "first", tmp_path / "theirs", "hf")
    for name in ("config.yaml", "equipoise.json", "generation_config.json"):
        (theirs / name).unlink()
    fast.save(str(theirs / "tokenizer.json"))
    (theirs / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    described = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(described | {"bos_token_id": 0, "eos_token_id": [0, 5]}))

    capsys.readouterr()
    run = run_convert(theirs, tmp_path / "run", "native")
    assert "no sentencepiece model" in capsys.readouterr().out
    read = load_run(run, torch.device("cpu")).tokenizer
    assert read.encode(text) == fast.encode(text).ids
    assert read.decode(read.encode(text)) == text
    assert (read.size, read.eos) == (300, 0)
    with pytest.raises(ConfigError, match="no sentencepiece model, so it cannot be trained"):
        run_convert(theirs, tmp_path / "more", "native", "--data.path", str(corpus))
    again = run_convert(run, tmp_path / "again", "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (theirs / name).read_bytes()
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == [0, 5]


@pytest.mark.parametrize("begins", [False, True])
def test_a_token_before_every_text_is_told_of(begins: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' tokenizer puts it there, and ours does not."""
    fast = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "</s>"]
    fast.train_from_iterator([""], vocab_size=258, special_tokens=special, show_progress=False)
    if begins:
        fast.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    write_run(tmp_path / "first", tiny(**LLAMA, vocab_size=258))
    theirs = run_convert(tmp_path / "first", tmp_path / "theirs", "hf")
    for name in ("config.yaml", "equipoise.json", "generation_config.json"):
        (theirs / name).unlink()
    fast.save(str(theirs / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (theirs / "tokenizer_config.json").write_text(json.dumps(kind))
    capsys.readouterr()
    run = run_convert(theirs, tmp_path / "run", "native")
    assert ("puts <s> before every text" in capsys.readouterr().out) == begins
    ids = AutoTokenizer.from_pretrained(theirs)("a text").input_ids
    assert ids == [*([0] if begins else []), *load_run(run, torch.device("cpu")).tokenizer.encode("a text")]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a llama run of 60 steps."""
    folder = tmp_path_factory.mktemp("trained")
    shape = {"plan": "llama", "width": 32, "depth": 2, "heads": 2, "context": 32}
    settings = {"name": "first", "model": shape, "optimizer": {"name": "adamw", "lr": 0.01}, "train": {"steps": 60}}
    return train(write_config(folder, corpus, settings))


def train(config: Path) -> Path:
    """What ``python -m pretrain`` does, in this process; returns the run's folder."""
    trainer = Trainer(load_config(config), WORLD)
    assert trainer.run() is Outcome.FINISHED
    return trainer.folder.path


@pytest.mark.parametrize("optimizer", ["adamw", "msgdw"])
def test_an_imported_model_trains_on(optimizer: str, trained: Path, corpus: Path, tmp_path: Path) -> None:
    """From its own loss, not from that of random weights: what was trained for some steps, exported, and imported
    without its configuration goes on at the loss that it had."""
    run_convert(trained, tmp_path / "hf", "hf")
    for name in ("config.yaml", "equipoise.json"):
        (tmp_path / "hf" / name).unlink()
    overrides = ["--data.path", str(corpus), "--train.steps", "5", "--optimizer.name", optimizer]
    overrides += ["--optimizer.lr", "1e-3", "--log.every", "1", "--device", "cpu"]
    again = train(run_convert(tmp_path / "hf", tmp_path / "again", "native", *overrides) / "config.yaml")
    before = [record["loss"] for record in metrics(trained) if "loss" in record]
    after = [record["loss"] for record in metrics(again) if "loss" in record]
    assert len(after) == 5
    assert abs(after[0] - before[-1]) < 0.3 < before[0] - before[-1], (before, after)


@pytest.mark.parametrize("target", ["torch", "safetensors"])
def test_a_run_goes_on_after_a_round_trip_as_if_there_had_been_none(target: str, trained: Path, tmp_path: Path) -> None:
    """With its optimizer state, step and place in the data: the same losses to the last bit."""
    run_convert(trained, tmp_path / "there", target, "--optimizer")
    longer = ["--train.steps", "64", "--schedule.name", "constant"]
    runs = []
    for source_of in (trained, tmp_path / "there"):
        name = f"{source_of.name}-on"
        options = ["--optimizer", "--allow-pickle", *longer]
        runs.append(train(run_convert(source_of, tmp_path / name, "native", *options) / "config.yaml"))
    direct, round_trip = ([(r["step"], r["loss"]) for r in metrics(run) if "loss" in r] for run in runs)
    assert direct == round_trip
    assert [step for step, _ in direct] == [61, 62, 63, 64]


def test_training_text_of_another_tokenizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny(**LLAMA), tokenizer=b"another")
    with pytest.raises(ConfigError, match="prepared with another tokenizer"):
        run_convert(tmp_path / "run", tmp_path / "again", "native", "--data.path", str(corpus))


def test_verification_compares_with_transformers(
    sentencepiece_model: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(**LLAMA, vocab_size=512, context=64)
    write_run(tmp_path / "run", config, tokenizer=sentencepiece_model)
    run_convert(tmp_path / "run", tmp_path / "hf", "hf", "--verify", "--dtype", "bf16")
    said = capsys.readouterr().out
    assert "64 tokens of Persuasion, reloaded by transformers' LlamaForCausalLM" in said
    assert "rounding the weights moved them by up to" in said
    run_convert(tmp_path / "run", tmp_path / "st", "safetensors", "--verify")
    assert "maximal absolute difference 0.00e+00" in capsys.readouterr().out
    # A mistake in the map of names: query and key exchanged, which have the same shape.
    swapped = {"k": "self_attn.q_proj", "q": "self_attn.k_proj"}
    for part, name in swapped.items():
        monkeypatch.setitem(huggingface.to_llama.__globals__["_LLAMA_BLOCK"], f"attention.{part}", name)
    with pytest.raises(ConfigError, match=r"maximal absolute difference .*: the conversion is wrong"):
        run_convert(tmp_path / "run", tmp_path / "wrong", "hf", "--verify")
    assert not [path.name for path in tmp_path.iterdir() if "wrong" in path.name]


def test_half_precision(tmp_path: Path) -> None:
    """One dtype in the folders of transformers' classes; elsewhere gains and alphas stay fp32. Back, all is fp32."""
    ours = write_run(tmp_path / "run", tiny(plan="dyt"))
    run_convert(tmp_path / "run", tmp_path / "own", "safetensors", "--dtype", "bf16")
    run_convert(tmp_path / "own", tmp_path / "back", "native")
    matrices = {n for n, p in ours.named_parameters() if p.ndim == 2}
    expected = {n: p.detach().bfloat16().float() if n in matrices else p.detach() for n, p in ours.named_parameters()}
    assert_bitwise(model_of(tmp_path / "back"), expected)
    with pytest.raises(ConfigError, match="--dtype: native holds fp32"):
        run_convert(tmp_path / "own", tmp_path / "again", "native", "--dtype", "bf16")
