"""What others may hand us: each is one clear line, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.building import tiny
from tests.runs import ONE_THREAD, REPOSITORY
from tests.tools.converting import run_convert, write_run
from tools import convert
from tools.command import run
from tools.formats import writing
from tools.formats.lazy import StoredTensor

LLAMA = tiny(plan="llama")
GPT = tiny(plan="gpt", trunk="gpt", bias=True, ffn_width=None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as a stranger would publish them, without our own files: one shard, many shards, GPT-2."""
    home = tmp_path_factory.mktemp("exported")
    write_run(home / "llama", LLAMA)
    write_run(home / "gpt", GPT)
    run_convert(home / "llama", home / "one", "hf")
    run_convert(home / "llama", home / "many", "hf", "--shard-size", "20KB")
    run_convert(home / "gpt", home / "gpt2", "hf")
    for folder in ("one", "many", "gpt2"):
        for name in ("config.yaml", "equipoise.json"):
            (home / folder / name).unlink()
    return home


def refused(capsys: pytest.CaptureFixture[str], source: Path, *arguments: str) -> str:
    """The one line that is said; nothing is printed or written but that."""
    home = source.parent
    before = sorted(path.name for path in home.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run(lambda: convert.main([str(source), str(home / "out"), "--to", "native", *arguments]))
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    assert sorted(path.name for path in home.iterdir()) == before
    return said.err


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("one", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
    ("one", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of type 'llama3'"),
    ("one", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters of type 'yarn'"),
    ("one", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta is 10000.0"),
    ("one", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "scaled rotary"),
    ("one", {"rope_scaling": "linear"}, "rope_scaling 'linear'"),
    ("one", {"sliding_window": 8}, "sliding_window 8"),
    (
        "one",
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8},
        "sliding_window 8",
    ),
    (
        "one",
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "max_position_embeddings": 9999,
        },
        "sliding_window 4096",  # transformers' default where the key is absent
    ),
    ("one", {"attention_bias": True}, "attention_bias True and mlp_bias False"),
    ("one", {"attention_bias": True, "mlp_bias": True}, "lacks blocks.0.attention.k.bias and 13 more"),
    ("one", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ("one", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("one", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("one", {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0, which is not known"),
    ("one", {"head_dim": 16}, "head_dim 16"),
    ("one", {"num_attention_heads": 5}, "head_dim"),
    ("one", {"num_key_value_heads": 3}, "kv_heads 3 does not divide"),
    ("one", {"num_hidden_layers": 3}, "lacks blocks.2"),
    ("one", {"num_hidden_layers": 1}, "also has model.layers.1"),
    ("one", {"vocab_size": 62}, "embedding.weight has the shape (61, 32)"),
    ("one", {"intermediate_size": 41}, "(40, 32)"),
    ("one", {"hidden_size": "absent"}, "hidden_size is None"),
    ("one", {"hidden_size": "32"}, "hidden_size is '32'"),
    ("one", {"hidden_size": -32}, "hidden_size is -32"),
    ("one", {"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
    ("one", {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    ("one", {"tie_word_embeddings": True}, "lm_head.weight is another tensor"),
    ("one", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ("one", {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "architecture Qwen2ForCausalLM"),
    ("one", {"architectures": ["LlamaForCausalLM"], "model_type": "granite"}, "model_type granite"),
    ("one", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ("one", {"architectures": "absent", "model_type": "absent"}, "architecture None"),
    ("one", {"architectures": [{}]}, "architecture {}"),
    ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("gpt2", {"n_positions": 8}, "positions.weight has the shape (16, 32)"),
    ("gpt2", {"n_embd": 64}, "c_attn.weight has the shape"),
]


@pytest.mark.parametrize(("folder", "changes", "message"), CONFIGS, ids=[f"{f} {c}"[:60] for f, c, _ in CONFIGS])
def test_configurations_that_compute_something_else(
    folder: str,
    changes: dict[str, Any],
    message: str,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(exported / folder, tmp_path / "model")
    rewrite(tmp_path / "model", **changes)
    assert message in refused(capsys, tmp_path / "model")


def test_a_window_no_shorter_than_the_context_is_none(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "one", tmp_path / "model")
    rewrite(tmp_path / "model", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=16)
    rewrite(tmp_path / "model", attention_bias="absent", mlp_bias="absent")
    run_convert(tmp_path / "model", tmp_path / "out", "native")


def _edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def _edit_header(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


NORM = "model.norm.weight"


def _outside(folder: Path) -> None:
    """A shard that is a link to a whole and fitting file elsewhere."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    shard = sorted(folder.glob("model-00001-*"))[0]
    shutil.move(shard, elsewhere / "secret")
    shard.symlink_to(elsewhere / "secret")


def _link(path: Path) -> None:
    (path.parent.parent / "elsewhere").mkdir()
    shutil.move(path, path.parent.parent / "elsewhere" / "secret")
    path.symlink_to(path.parent.parent / "elsewhere" / "secret")


def _overlap(header: dict[str, Any]) -> None:
    begin, end = header["model.embed_tokens.weight"]["data_offsets"]
    header[NORM]["data_offsets"] = [begin, begin + 32 * 4]
    assert end - begin > 32 * 4


def _cut(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("many", lambda f: _edit_index(f, lambda m: m.update({NORM: "/etc/passwd"})), "names the file '/etc/passwd'"),
    ("many", lambda f: _edit_index(f, lambda m: m.update({NORM: "../other.safetensors"})), "'../other.safetensors'"),
    ("many", lambda f: _edit_index(f, lambda m: m.update({NORM: ".."})), "names the file '..'"),
    ("many", lambda f: _edit_index(f, lambda m: m.update({NORM: ["a"]})), "lacks ['a']"),  # type: ignore[dict-item]
    (
        "many",
        lambda f: _edit_index(f, lambda m: m.update({NORM: "none.safetensors"})),
        "lacks none.safetensors",
    ),
    ("many", lambda f: _edit_index(f, lambda m: m.pop(NORM)), f"also has {NORM}"),
    ("many", lambda f: _edit_index(f, lambda m: m.update(extra=m[NORM])), "lacks extra"),
    ("many", lambda f: _edit_index(f, lambda m: m.clear()), "no weight_map"),
    ("many", lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000), "no JSON object"),
    ("many", _outside, "a link to outside of its folder"),
    ("one", lambda f: _edit_tensors(f, lambda t: t.pop(NORM)), "lacks final.weight"),
    ("one", lambda f: _edit_tensors(f, lambda t: t.update(more=torch.ones(2))), "also has more"),
    ("one", lambda f: _edit_tensors(f, lambda t: t.update({NORM: torch.ones(33)})), "has the shape (33,)"),
    ("one", lambda f: _edit_tensors(f, lambda t: t.update({NORM: torch.ones(32).long()})), "holds torch.int64"),
    ("one", lambda f: _edit_header(f, _overlap), "no whole safetensors file"),
    ("one", lambda f: _edit_header(f, lambda h: h[NORM].update(shape=[2**62, 4])), "no whole safetensors file"),
    ("one", lambda f: _edit_header(f, lambda h: h[NORM].update(dtype="F8_E4M3")), "no whole safetensors file"),
    ("one", lambda f: _cut(f, -5), "no whole safetensors file"),
    ("one", lambda f: _cut(f, 100), "no whole safetensors file"),
    ("one", lambda f: _cut(f, 3), "no whole safetensors file"),
    ("one", lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "no whole safetensors file"),
    ("one", lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    ("one", lambda f: (f / "config.json").write_bytes(b"\x80\x02."), "config.json is no JSON object"),
    ("one", lambda f: (f / "config.json").unlink(), "has no config.yaml"),
    ("one", lambda f: (f / "generation_config.json").write_bytes(b"\xff"), "generation_config.json"),
    ("one", lambda f: (f / "tokenizer.model").write_bytes(b"\xff" * 50), "is not a sentencepiece model"),
    ("one", lambda f: _link(f / "model.safetensors"), "a link to outside of its folder"),
]


@pytest.mark.parametrize(("folder", "damage", "message"), DAMAGE, ids=[message for _, _, message in DAMAGE])
def test_damaged_and_deceitful_files(
    folder: str,
    damage: Callable[[Path], Any],
    message: str,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(exported / folder, tmp_path / "model")
    damage(tmp_path / "model")
    assert message in refused(capsys, tmp_path / "model", "--to", "hf")


def test_a_tied_head_may_stand_in_the_file_twice(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "one", tmp_path / "model")
    rewrite(tmp_path / "model", tie_word_embeddings=True)
    _edit_tensors(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    run_convert(tmp_path / "model", tmp_path / "out", "native")


class Exploit:
    """Runs a program when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


def test_pickles_run_nothing(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "pwned"
    shutil.copytree(exported / "one", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    weights = tmp_path / "model" / "pytorch_model.bin"
    torch.save({"a": Exploit(mark)}, weights)
    assert "is a pickle" in refused(capsys, tmp_path / "model")
    assert "is not read" in refused(capsys, tmp_path / "model", "--allow-pickle")
    weights.write_bytes(pickle.dumps(Exploit(mark)))
    assert "is not read" in refused(capsys, tmp_path / "model", "--allow-pickle")
    weights.write_bytes(b"PK\x03\x04 no archive")
    assert "is not read" in refused(capsys, tmp_path / "model", "--allow-pickle")
    torch.save({"a": {"b": torch.ones(2)}}, weights)
    assert "no state dict" in refused(capsys, tmp_path / "model", "--allow-pickle")
    assert not mark.exists()


def test_sources_and_options_that_make_no_sense(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("nothing of the kind")
    shutil.copytree(exported / "one", tmp_path / "one")
    assert "is nothing that can be converted" in refused(capsys, tmp_path / "empty")
    assert "is no torch, safetensors or GGUF file" in refused(capsys, tmp_path / "text")
    assert "does not exist" in refused(capsys, tmp_path / "nowhere")
    assert "holds no optimizer state" in refused(capsys, tmp_path / "one", "--optimizer")
    assert "--shard-size is '5 things'" in refused(capsys, tmp_path / "one", "--shard-size", "5 things")
    assert "--model keys" in refused(capsys, tmp_path / "one", "--model.depth", "3")
    assert "there is no key 'train.step'" in refused(capsys, tmp_path / "one", "--train.step", "3")
    assert "follows no key" in refused(capsys, tmp_path / "one", "stray")
    (tmp_path / "out").mkdir()
    assert "exists: name another" in refused(capsys, tmp_path / "one")


def test_values_beyond_fp16_are_not_made_infinite(
    tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported / "one", tmp_path / "model")
    _edit_tensors(tmp_path / "model", lambda t: t["model.embed_tokens.weight"].fill_(1e5))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(lambda: convert.main([str(tmp_path / "model"), str(tmp_path / "out"), "--to", "hf", "--dtype", "fp16"]))
    assert "embedding.weight has values beyond the range of float16" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("target", ["native", "hf", "torch", "safetensors"])
@pytest.mark.parametrize("fault", ["interrupt", "full disk"])
def test_nothing_is_left_of_a_conversion_that_fails_midway(
    target: str,
    fault: str,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(exported / "one", tmp_path / "model")
    reads = 0
    real = StoredTensor.__init__

    def failing(self: StoredTensor, shape: Any, dtype: Any, read: Any, *place: Any) -> None:
        def counted() -> torch.Tensor:
            nonlocal reads
            reads += 1
            if reads > 5:
                raise KeyboardInterrupt if fault == "interrupt" else OSError(errno.ENOSPC, "No space left on device")
            return read()  # type: ignore[no-any-return]

        real(self, shape, dtype, counted, *place)

    monkeypatch.setattr(StoredTensor, "__init__", failing)
    with pytest.raises(SystemExit) as left:
        run(lambda: convert.main([str(tmp_path / "model"), str(tmp_path / "out"), "--to", target]))
    assert reads > 5
    assert left.value.code == (130 if fault == "interrupt" else 2)
    said = capsys.readouterr().err
    assert said == "" or said.count("\n") == 1
    assert ("No space left" in said) == (fault == "full disk")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_conversion_left_is_swept(exported: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "checkpoints").mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    run_convert(exported / "one", tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "checkpoints" not in [path.name for path in (tmp_path / "out").iterdir()]


def test_two_conversions_to_one_place(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(exported / "one", tmp_path / "model")
    with writing.aside(tmp_path / "out"):
        assert "another process is writing" in refused(capsys, tmp_path / "model")


def test_a_full_disk_is_seen_before(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported / "one", tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "no space in" in refused(capsys, tmp_path / "model")


def test_the_command_answers_in_one_line(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "one", tmp_path / "model")
    rewrite(tmp_path / "model", rope_scaling={"type": "dynamic"})
    command = [sys.executable, "-m", "tools.convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "torch"]
    done = subprocess.run(command, cwd=REPOSITORY, env=ONE_THREAD, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "rope_scaling of type 'dynamic'" in done.stderr
    assert done.stderr.count("\n") == 1
