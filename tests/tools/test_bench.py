"""The command line of the benchmarks: each measures a small run and writes what it found; mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.errors import ConfigError
from pretrain.cli import dump
from tests.tools.small_run import prepare_small, small_config
from tools import bench
from tools.benching import checkpoint, data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a small run."""
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "run.yaml"
    path.write_text(dump(small_config(folder, prepare_small(folder))))
    return path


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results go. Memory is measured in a moment."""
    for module in ("checkpoint", "data", "kernels"):
        monkeypatch.setattr(f"tools.benching.{module}.copy_bandwidth", lambda device: 1e9)
    return tmp_path / "out"


def results(folder: Path) -> dict[str, Any]:
    assert (folder / "picture.svg").read_text().startswith("<svg")
    assert (folder / "table.md").read_text().startswith("# ")
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert found["environment"]["packages"]["torch"] == torch.__version__
    return found


def rows(found: dict[str, Any], table: int) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["tables"][table]["rows"]}


def test_model(run: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["model", str(run), "--model.depth", "1", "--rounds", "2", "--steps", "1", "--output", str(out)]
    bench.main([*command, "--against", "nanogpt", "--variants", "fp32", "bf16"])
    name = f"{run} --model.depth 1"
    said = capsys.readouterr().out
    assert f"model of {name}: rounds 2, steps 1, device cpu" in said
    assert "to nanogpt as it runs on cpu (fp32): " in said
    speeds = rows(results(out), 0)
    assert list(speeds) == [f"{v} {n}" for v in ("fp32", "bf16") for n in ("nanogpt", "our gpt", name)]
    assert all(len(row["values"]) == 2 for row in speeds.values())
    assert speeds["fp32 nanogpt"]["more"]["parameters"] == speeds["fp32 our gpt"]["more"]["parameters"]

    bench.main([*command, "--against", f"{run},hf", "--plans", "llama,dyt"])
    found = results(out)
    others = [str(run), "hf", "our llama", "llama", "dyt"]  # msgdw is not transformers' AdamW: so a twin
    assert list(rows(found, 0)) == [f"fp32 {other}" for other in others]
    ratios = rows(found, 1)
    assert "fp32 our llama / hf" in ratios
    assert "fp32 dyt / llama" in ratios
    speeds = rows(found, 0)
    quotients = [a / b for a, b in zip(*(speeds[f"fp32 {n}"]["values"] for n in ("dyt", "llama")), strict=True)]
    assert ratios["fp32 dyt / llama"]["values"] == pytest.approx(quotients)


def test_what_looking_inside_costs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command of docs/results.md, every look within a round."""
    often = ["--log.inspect_every", "2", "--against", str(run), "--steps", "2", "--rounds", "1"]
    bench.main(["model", str(run), *often])
    assert f"fp32 {run} --log.inspect_every 2 / {run}" in capsys.readouterr().out


def test_data(run: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.main(["data", str(run), "--rounds", "2", "--batches", "3", "--steps", "2", "--output", str(out)])
    loading = rows(results(out), 0)
    need = loading["training step: the need"]
    assert need["more"]["times the need"] == pytest.approx(1.0)
    assert all(len(row["values"]) == 2 for row in loading.values())
    assert loading["loader"]["limit"] == 1e9 / (2 + 8)  # a token is two bytes in the file and eight in the batch


def test_waiting_is_a_share_of_the_step() -> None:
    """By hand: batches of 128 tokens in 0.1 s are 1,280 a second, four times what a step of 0.4 s needs."""
    found = data.Found(loader=[0.1, 0.1], windows=[], step=[0.4, 0.4], waited=[0.004, 0.002])
    config = small_config(Path(), Path())
    streamed = bench.replace(config, data=bench.replace(config.data, source="stream"))
    (loading, waits, shares), notes = data.tables(streamed, found)
    assert list(loading.rows[0].values) == [1280.0, 1280.0]
    assert loading.rows[0].more["times the need"] == pytest.approx(4.0)
    assert loading.rows[1].why == "data.source is stream"
    assert list(waits.rows[0].values) == pytest.approx([4.0, 2.0])  # ms
    assert list(shares.rows[0].values) == pytest.approx([1.0, 0.5])  # %
    assert notes == []


def test_checkpoint(run: Path, out: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    bench.main(["checkpoint", str(run), "--rounds", "2", "--steps", "1", "--folder", str(disk), "--output", str(out)])
    found = results(out)
    saves, loads = rows(found, 0), rows(found, 1)
    assert [len(row["values"]) for row in [*saves.values(), *loads.values()]] == [2] * 8
    assert saves[checkpoint.HELD]["values"] < saves[checkpoint.WRITE]["values"]
    size = saves[checkpoint.IN_STEP]["more"]["GB"]
    assert saves[checkpoint.HELD]["limit"] == pytest.approx(2 * size)  # read and written, at 1 GB/s
    # weights and momentum, fp32, and in a checkpoint what else there is to know
    assert saves[checkpoint.SAFETENSORS]["more"]["GB"] < saves[checkpoint.TORCH]["more"]["GB"] < size
    assert not list(disk.iterdir())


def test_a_loaded_state_is_the_saved_one() -> None:
    state = {"model": {"a": torch.ones(2)}, "optimizer": {"state.a.m": torch.ones(3), "lr": 0.1}}
    flat = checkpoint._flat(state)
    assert list(flat) == ["model.a", "optimizer.state.a.m"]
    checkpoint._fill(flat, {name: torch.full_like(tensor, 7.0) for name, tensor in flat.items()})
    assert state["model"]["a"].tolist() == [7.0, 7.0]  # type: ignore[index]


def test_profile(run: Path, out: Path) -> None:
    bench.main(["profile", str(run), "--steps", "1", "--output", str(out)])
    (table,) = results(out)["tables"]
    assert sum(float(row["more"]["share"].removesuffix(" %")) for row in table["rows"]) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model", "RUN", "--rounds", "0"], "--rounds is 0"),
        (["model", "RUN", "--variants", "bf61"], "did you mean 'bf16'"),
        (["model", "RUN", "--against", "nanoGPT"], "no 'nanoGPT'; choose one of nanogpt, hf, litgpt, torchtitan"),
        (["model", "RUN", "--plans", "lama"], "did you mean 'llama'"),
        (["model", "RUN", "--against", "torchtitan"], "no backward on a CPU"),
        (["model", "RUN", "--model.widht", "8"], "did you mean 'model.width'"),
        (["model", "RUN", "--log.inspect_every", "4"], "with log.inspect_every 4 write a multiple of it, as 4"),
        (["data", "RUN", "--batches", "0"], "--batches is 0"),
        (["checkpoint", "RUN", "--folder", "nowhere"], "--folder nowhere is no folder"),
        (["startup", "RUN", "--against", "litgpt"], "startup has no script of 'litgpt'"),
        (["profile", "RUN", "--steps", "0"], "--steps is 0"),
        (["kernels", "--only", "rmsnorm"], "did you mean 'rms_norm'"),
        (["kernels", "--against", "lighter"], "kernels are measured against liger"),
        (["kernels", "--width", "30", "--heads", "4"], "--width 30 is not a multiple of twice --heads 4"),
        (["kernels", "--model.width", "8"], "kernels has no option --model.width"),
        (["gpu", "--minutes", "-1"], "--minutes is -1"),
    ],
)
def test_mistakes_are_named(run: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as said:
        bench.main([str(run) if word == "RUN" else word for word in options])
    assert "\n" not in str(said.value)


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tools.benching.gpu.gpu_memory", lambda: 0.0)
    with pytest.raises(ConfigError, match="no GPU is visible here: write --dry-run"):
        bench.main(["gpu", "--output", str(tmp_path)])


def test_memory_that_does_not_suffice_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    monkeypatch.setattr(bench, "lineup", full)
    with pytest.raises(ConfigError, match=r"^out of memory: CUDA out of memory\. Tried [^\n]* lower train"):
        bench.main(["model", str(run)])


def test_a_missing_compiler_is_named_before_anything_is_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(bench.model, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="needs no-such-compiler, which is not here"):
        bench.main(["model", str(run), "--variants", "fp32+compile"])
