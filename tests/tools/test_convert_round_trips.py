"""There and back, bit for bit, over plans and sizes: weights, optimizer state, step and place in the data."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from models import ModelConfig
from models.plan import PLANS
from pretrain.config import OptimizerConfig
from pretrain.run import RunFolder
from tests.models.building import build
from tests.runs import checkpoint_tensors
from tests.tools.converting import assert_bitwise, model_of, run_convert, stepped, tensors_of, write_run

OPTIMIZERS = {
    "msgdw": OptimizerConfig(name="msgdw", lr=0.1),
    "adamw": OptimizerConfig(name="adamw", lr=1e-3),
    "msgdw in bf16": OptimizerConfig(name="msgdw", lr=0.1, state_dtype="bf16"),
    "adamw in bf16": OptimizerConfig(name="adamw", lr=1e-3, state_dtype="bf16"),
}


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    """Any plan on any trunk, in sizes that no alignment helps."""
    trunk = draw(st.sampled_from(["llama", "gpt"]))
    heads = draw(st.sampled_from([1, 2, 4]))
    return ModelConfig(
        plan=draw(st.sampled_from(sorted(PLANS))),
        trunk=trunk,
        heads=heads,
        kv_heads=draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])),
        width=heads * 2 * draw(st.integers(1, 5)),
        depth=draw(st.integers(1, 3)),
        ffn_width=draw(st.integers(1, 30)),
        vocab_size=draw(st.integers(2, 80)),
        context=draw(st.integers(1, 20)),
        bias=draw(st.booleans()),
        tied=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6, 3e-4])),
    )


@pytest.mark.parametrize("there", ["torch", "safetensors", "hf", "native"])
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(model=shapes(), shard=st.sampled_from(["1KB", "10KB", "5GB"]))
def test_weights_come_back(there: str, model: ModelConfig, shard: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        ours = write_run(place / "run", model)
        run_convert(place / "run", place / "there", there, "--shard-size", shard)
        run_convert(place / "there", place / "back", "native", "--allow-pickle")
        assert_bitwise(model_of(place / "back"), ours.state_dict())
        before, after = (RunFolder(place / name).read_config() for name in ("run", "back"))
        assert before.model == after.model
        assert [path.name for path in (place / "back" / "checkpoints").iterdir()] == ["step-00000007"]
        extras = json.loads((place / "back" / "checkpoints" / "step-00000007" / "extras.json").read_text())
        assert extras == {"data": {"prepared": "of some text"}}
        assert not list(place.glob(".*"))


@pytest.mark.parametrize("there", ["torch", "safetensors", "native"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_state_comes_back(there: str, optimizer: OptimizerConfig, tmp_path: Path) -> None:
    model = ModelConfig(plan="dyt", width=8, depth=2, heads=2, ffn_width=12, vocab_size=13, context=8)
    state = stepped(build(model), optimizer)
    write_run(tmp_path / "run", model, optimizer=(optimizer, state))
    run_convert(tmp_path / "run", tmp_path / "there", there, "--optimizer")
    run_convert(tmp_path / "there", tmp_path / "back", "native", "--optimizer", "--allow-pickle")
    assert_bitwise(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "run"))
    assert plain_values(tmp_path / "back") == plain_values(tmp_path / "run") != {}


def plain_values(run: Path) -> dict[str, Any]:
    (checkpoint,) = (run / "checkpoints").iterdir()
    return {name: v for name, v in checkpoint_tensors(checkpoint).items() if not isinstance(v, Tensor)}


def test_the_files_are_what_their_libraries_read(tmp_path: Path) -> None:
    """Plain state dicts under our own names: with torch and safetensors alone."""
    model = ModelConfig(plan="dnt", width=8, depth=2, heads=2, ffn_width=12, vocab_size=13, context=8)
    ours = write_run(tmp_path / "run", model)
    run_convert(tmp_path / "run", tmp_path / "torch", "torch")
    run_convert(tmp_path / "run", tmp_path / "one", "safetensors")
    run_convert(tmp_path / "run", tmp_path / "many", "safetensors", "--shard-size", "1KB")
    assert_bitwise(torch.load(tmp_path / "torch" / "model.pt", weights_only=True), ours.state_dict())
    assert_bitwise(torch.load(tmp_path / "torch" / "model.pt", weights_only=True, mmap=True), ours.state_dict())
    assert_bitwise(load_file(tmp_path / "one" / "model.safetensors"), ours.state_dict())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    merged: dict[str, Tensor] = {}
    for shard in shards:
        part = load_file(shard)
        assert all(index["weight_map"][name] == shard.name for name in part)
        assert sum(t.nbytes for t in part.values()) <= 1000 or len(part) == 1
        merged |= part
    assert_bitwise(merged, ours.state_dict())


def test_chunks_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    """A checkpoint of two ranks, each with half of every tensor's rows."""
    from tests.ranks import run_ranks

    run_ranks(_save_sharded, 2, str(tmp_path / "run"))
    run_convert(tmp_path / "run", tmp_path / "out", "safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    reference = write_run(tmp_path / "whole", _SHARDED, seed=5)
    assert_bitwise(found, reference.state_dict())


_SHARDED = ModelConfig(plan="dyt", width=8, depth=1, heads=2, ffn_width=12, vocab_size=13, context=8)


def _save_sharded(folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from pretrain.checkpoint import Checkpointer, rng_state
    from pretrain.cli import dump
    from tests.models.building import scrambled
    from tools.formats.weights import run_config

    mesh = init_device_mesh("cpu", (2,))
    weights = scrambled(_SHARDED, seed=5).state_dict()
    sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in weights.items()}
    run = Path(folder)
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(dump(run_config(_SHARDED)))
    checkpointer = Checkpointer(run / "checkpoints", keep=1, keep_every=None, group=dist.new_group(backend="gloo"))
    checkpointer.save(3, {"model": sharded}, {"data": {}}, rng_state())
