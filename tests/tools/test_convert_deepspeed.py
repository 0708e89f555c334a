"""DeepSpeed's checkpoints of two ranks, written and loaded by DeepSpeed itself."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from models import ConfigError, ModelConfig, parameter_roles
from pretrain.cli import dump
from pretrain.config import OptimizerConfig
from pretrain.engines import build_engine
from pretrain.engines.zero_state import ZeroState
from pretrain.optimizers import build_optimizer
from tests.models.building import build, scrambled, tokens
from tests.ranks import run_ranks
from tests.tools.converting import assert_bitwise, run_convert, stepped, tensors_of, write_run
from tests.tools.small_run import WORLD
from tools.formats import optimizer as states
from tools.formats import source
from tools.formats.lazy import LazyTensor
from tools.formats.weights import run_config

# Sizes that leave partitions uneven: odd groups, a parameter cut by a rank's end, fewer values than ranks.
MODEL = ModelConfig(plan="dyt", width=8, depth=2, heads=2, ffn_width=11, vocab_size=13, context=8)
OPTIMIZERS = {
    "adamw": OptimizerConfig(name="adamw", lr=0.01, lr_factors={"gain": 0.5}),
    "msgdw": OptimizerConfig(name="msgdw", lr=0.01),
}
STATES = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "msgdw": {"momentum_buffer"}}
CASES = [(0, "adamw"), (1, "adamw"), (2, "msgdw"), (3, "msgdw"), (3, "adamw")]
# DeepSpeed's own loader of universal checkpoints fails on a group with fewer values than ranks, such as dyt's scale.
LOADABLE = ModelConfig(plan="dnt", width=8, depth=2, heads=2, ffn_width=11, vocab_size=13, context=8)


def _engine(stage: int, optimizer: OptimizerConfig, config: ModelConfig, seed: int, **more: Any) -> Any:
    """A DeepSpeed engine as a stranger's script would make one."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would build C++ for a minute
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model = scrambled(config, seed)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    inner = build_optimizer(dict(model.named_parameters()), parameter_roles(model), optimizer)
    return deepspeed.initialize(model=model, optimizer=inner, config=settings | more, dist_init_required=False)[0]


def _whole(engine: Any, stage: int) -> dict[str, Tensor]:
    """Weights and optimizer state, put together by DeepSpeed, under the names of a checkpoint of ours."""
    inner = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    read = ZeroState(engine.module, inner, engine.optimizer, stage).read()
    found = {f"model.{name}": tensor for name, tensor in read["model"].items()}
    found |= {name: value for name, value in read["optimizer"].items() if isinstance(value, Tensor)}
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}


def _train_and_save(folder: str) -> dict[str, dict[str, Tensor]]:
    whole = {}
    for stage, name in CASES:
        engine = _engine(stage, OPTIMIZERS[name], MODEL, seed=stage)
        for step in range(3):
            batch = tokens(1, 8, seed=step, vocabulary=13)
            engine.backward(engine(batch, batch)[0] / 8)
            engine.step()
        engine.save_checkpoint(f"{folder}/{stage}-{name}")
        whole[f"{stage}-{name}"] = _whole(engine, stage)
    return whole


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A folder with a checkpoint of each case, and what is in them."""
    folder = tmp_path_factory.mktemp("deepspeed")
    whole = run_ranks(_train_and_save, 2, str(folder), timeout=120)[0]
    for stage, name in CASES:
        config = run_config(MODEL)
        (folder / f"{stage}-{name}" / "config.yaml").write_text(dump(config))
    return folder, whole


@pytest.mark.parametrize(("stage", "name"), CASES)
def test_what_ranks_saved_is_put_together(stage: int, name: str, saved: Any, tmp_path: Path) -> None:
    folder, whole = saved[0] / f"{stage}-{name}", saved[1][f"{stage}-{name}"]
    options = ["--allow-pickle", "--optimizer", "--optimizer.name", name]
    run = run_convert(folder, tmp_path / "run", "native", *options)
    found = {key.removeprefix("optimizer."): tensor for key, tensor in tensors_of(run).items()}
    assert_bitwise(found, whole)
    assert {key.rsplit(".", 1)[-1] for key in found if key.startswith("state.")} == STATES[name]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    _, read = source.read(run, allow_pickle=False, with_optimizer=True)
    assert read.optimizer is not None
    factor = read.optimizer["param_groups.final.weight.lr_factor"]
    assert factor == (0.5 if name == "adamw" else 1.0)
    # The folder that save_checkpoint made within its own serves too.
    run_convert(folder / "global_step3", tmp_path / "other", "safetensors", "--allow-pickle")


@pytest.mark.parametrize(("stage", "name"), [(1, "adamw"), (2, "msgdw")])
def test_universal_checkpoints_come_back(stage: int, name: str, saved: Any, tmp_path: Path) -> None:
    options = ["--allow-pickle", "--optimizer"]
    run = run_convert(saved[0] / f"{stage}-{name}", tmp_path / "run", "native", *options, "--optimizer.name", name)
    run_convert(run, tmp_path / "universal", "deepspeed", "--optimizer", "--verify")
    back = run_convert(tmp_path / "universal", tmp_path / "back", "native", *options)
    assert_bitwise(tensors_of(back), tensors_of(run))
    plain = []
    for folder in (run, back):
        _, read = source.read(folder, allow_pickle=False, with_optimizer=True)
        assert read.optimizer is not None
        plain.append({key: value for key, value in read.optimizer.items() if not isinstance(value, LazyTensor)})
    assert plain[0] == plain[1]
    with pytest.raises(ConfigError, match="deepspeed holds fp32"):
        run_convert(run, tmp_path / "low", "deepspeed", "--dtype", "bf16")


def _load(folder: str, cases: list[tuple[int, str, str]]) -> list[dict[str, Tensor]]:
    found = []
    for stage, name, checkpoint in cases:
        engine = _engine(stage, OPTIMIZERS[name], LOADABLE, seed=99, checkpoint={"load_universal": True})
        whole = checkpoint != "weights"
        path, _ = engine.load_checkpoint(f"{folder}/{checkpoint}", load_module_only=not whole)
        assert path is not None
        assert engine.global_steps == (7 if whole else 0)
        found.append(_whole(engine, stage) if whole else _weights(engine))
    return found


def _weights(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = engine.module.named_parameters()
    return {
        f"model.{n}": safe_get_full_fp32_param(p).view(getattr(p, "ds_shape", p.shape)).clone() for n, p in parameters
    }


def test_deepspeed_loads_what_is_written(tmp_path: Path) -> None:
    """On two ranks: with optimizer state where its loader takes names other than Adam's (stages 1 and 2), weights alone
    everywhere."""
    expected = {}
    for name, optimizer in OPTIMIZERS.items():
        state = stepped(build(LOADABLE), optimizer)
        weights = write_run(tmp_path / f"run-{name}", LOADABLE, optimizer=(optimizer, state))
        run_convert(tmp_path / f"run-{name}", tmp_path / name, "deepspeed", "--optimizer")
        expected[name] = {f"model.{n}": p.detach() for n, p in weights.named_parameters()}
        expected["weights"] = dict(expected[name])
        expected[name] |= {key: value for key, value in state.items() if isinstance(value, Tensor)}
    run_convert(tmp_path / "run-adamw", tmp_path / "weights", "deepspeed")
    cases = [(1, "adamw", "adamw"), (2, "msgdw", "msgdw"), (3, "adamw", "adamw")]
    cases += [(2, "adamw", "weights"), (3, "msgdw", "weights")]
    loaded = run_ranks(_load, 2, str(tmp_path), cases, timeout=120)[0]
    for case, found in zip(cases, loaded, strict=True):
        assert_bitwise(found, expected[case[2]])


def _damage(folder: Path, what: str) -> None:
    if what == "a rank is missing":
        (folder / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    elif what == "a tag that leads out":
        (folder / "latest").write_text("../2-msgdw/global_step3")
    elif what == "split among ranks":
        place = folder / "global_step3"
        (place / "mp_rank_01_model_states.pt").write_bytes((place / "mp_rank_00_model_states.pt").read_bytes())
    elif what == "no configuration":
        (folder / "config.yaml").unlink()
    else:
        (folder / "config.yaml").write_text(dump(run_config(ModelConfig(vocab_size=13))))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a rank is missing", "the files of 1 of 2 ranks"),
        ("a tag that leads out", "names the file '../2-msgdw/global_step3'"),
        ("split among ranks", "a model that was split among ranks"),
        ("no configuration", "has no config.yaml"),
        ("another model", "lacks blocks."),
    ],
)
def test_damaged_checkpoints(what: str, message: str, saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved[0] / "1-adamw", tmp_path / "saved")
    with pytest.raises(ConfigError, match="is a pickle"):
        run_convert(tmp_path / "saved", tmp_path / "out", "native")
    _damage(tmp_path / "saved", what)
    with pytest.raises(ConfigError, match=message):
        run_convert(tmp_path / "saved", tmp_path / "out", "native", "--allow-pickle")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_fresh_state_is_the_engine_s(tmp_path: Path) -> None:
    """The state of a run that has made no step: names, shapes and settings as the engine's own checkpoint has them."""
    for optimizer in (*OPTIMIZERS.values(), OptimizerConfig(name="msgdw", state_dtype="bf16")):
        config = replace(run_config(MODEL), optimizer=optimizer, device="cpu")
        engine = build_engine(config, WORLD)
        engine.initialize()
        expected, made = engine.tensors()["optimizer"], states.fresh(config)
        assert made.keys() == expected.keys()
        for key, value in expected.items():
            found = made[key].read() if isinstance(made[key], LazyTensor) else made[key]
            if key.endswith(".step"):  # torch counts the step that made the engine's state
                assert found == 0 == value - 1
            elif isinstance(value, Tensor):
                assert_bitwise({key: found}, {key: value})
            else:
                assert found == value


def test_weights_of_a_model_of_transformers(tmp_path: Path) -> None:
    """Its own names and a config.json beside them, as a training script with DeepSpeed leaves them."""
    config = ModelConfig(plan="llama", width=8, depth=1, heads=2, ffn_width=12, vocab_size=13, context=8, tied=False)
    ours = write_run(tmp_path / "run", config)
    hf = run_convert(tmp_path / "run", tmp_path / "hf", "hf")
    theirs: nn.Module = AutoModelForCausalLM.from_pretrained(hf)
    place = tmp_path / "trained" / "global_step5"
    place.mkdir(parents=True)
    (tmp_path / "trained" / "latest").write_text("global_step5\n")
    described = json.loads((hf / "config.json").read_text())
    (tmp_path / "trained" / "config.json").write_text(json.dumps(described))
    state = {"module": theirs.state_dict(), "buffer_names": [], "global_steps": 5}
    torch.save(state | {"optimizer": {"state": {}, "param_groups": []}}, place / "mp_rank_00_model_states.pt")
    out = run_convert(tmp_path / "trained", tmp_path / "out", "native", "--allow-pickle")
    found = {n.removeprefix("model."): t for n, t in tensors_of(out).items()}
    assert_bitwise(found, ours.state_dict())
