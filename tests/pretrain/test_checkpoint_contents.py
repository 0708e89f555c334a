"""What goes in comes out, bit for bit; what must stay, stays; what does not fit is refused in one line."""

from __future__ import annotations

import math
import os
import pickle
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.checkpoint import Checkpointer, Committed, restore_rng_state, rng_state
from pretrain.checkpoint.commit import expired
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def checkpointer(folder: Path) -> Checkpointer:
    return Checkpointer(folder, keep=2, keep_every=None)


def whole(folder: Path) -> Committed:
    committed = checkpointer(folder).latest()
    assert committed is not None
    return committed


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    noise = torch.randint(0, 2 if dtype is torch.bool else 256, (64, 16 * size), dtype=torch.uint8)
    values = noise.view(dtype)  # NaNs with payloads, infinities, subnormals, negative zeros
    tensors = {"model": {"matrix": values, "view": values.t()[3:5], "scalar": values[0, 0].clone(), "none": values[:0]}}
    checkpointer(tmp_path).save(1, tensors, {}, {})
    loaded = {"model": {name: torch.zeros_like(value) for name, value in tensors["model"].items()}}
    places = {name: value.data_ptr() for name, value in loaded["model"].items()}
    checkpointer(tmp_path).load(whole(tmp_path), loaded)
    for name, value in loaded["model"].items():
        assert raw(value) == raw(tensors["model"][name])
        assert value.data_ptr() == places[name], "not in place"


def test_plain_values_and_extras(tmp_path: Path) -> None:
    groups = [{"lr": 0.1, "betas": (0.9, 0.95), "foreach": None, "nesterov": True, "params": ["a", "b.c"]}]
    extras = {"step": 7, "tokens": 10**12, "best": math.inf, "data": {"lane-0": {"shard": 3}}, "name": "Größe"}
    checkpointer(tmp_path).save(7, {"optimizer": {"param_groups": groups}}, extras, {})
    blank: dict[str, Any] = {"lr": 0, "betas": (0, 0), "foreach": 0, "nesterov": 0, "params": ["", ""]}
    tensors = {"optimizer": {"param_groups": [blank]}}
    loaded, _ = checkpointer(tmp_path).load(whole(tmp_path), tensors)
    assert tensors["optimizer"]["param_groups"] == groups
    assert loaded == extras


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item()  # noqa: NPY002

    draw()  # an odd number of normals: the second of each pair is part of the state
    checkpointer(tmp_path).save(1, {"model": {"w": torch.zeros(1)}}, {}, rng_state())
    expected = [draw() for _ in range(5)]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    assert [draw() for _ in range(5)] != expected
    _, state = checkpointer(tmp_path).load(whole(tmp_path), {"model": {"w": torch.zeros(1)}})
    assert state is not None
    restore_rng_state(state)
    assert [draw() for _ in range(5)] == expected


def test_only_the_parts_asked_for_are_read(tmp_path: Path) -> None:
    saved = {"model": {"w": torch.ones(3)}, "optimizer": {"state": {"w": {"momentum": torch.ones(3)}}}}
    checkpointer(tmp_path).save(1, saved, {}, {})
    tensors = {"model": {"w": torch.zeros(3)}}
    checkpointer(tmp_path).load(whole(tmp_path), tensors)
    assert tensors["model"]["w"].equal(torch.ones(3))


def save_and_load(folder: Path) -> str:
    warnings.simplefilter("error", append=True)  # behind the product's own filters, which pytest would take away
    with (folder / "said").open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    tensors = {"model": {"w": torch.ones(3)}}
    checkpointer(folder).save(1, tensors, {}, {})
    checkpointer(folder).load(whole(folder), tensors)
    sys.stdout.flush()
    sys.stderr.flush()
    return (folder / "said").read_text()


def test_nothing_is_printed_and_nothing_warned(tmp_path: Path) -> None:
    assert run_ranks(save_and_load, 1, tmp_path) == [""]


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


@pytest.mark.parametrize("place", ["tensors", "rank_state"])
def test_pickled_code_is_never_run(tmp_path: Path, place: str, capfd: pytest.CaptureFixture[str]) -> None:
    optimizer = {"hook": Exploit() if place == "tensors" else 0}
    checkpointer(tmp_path).save(1, {"optimizer": optimizer}, {}, {"hook": Exploit()} if place == "rank_state" else {})
    with pytest.raises(RuntimeError, match="Weights only load failed"):
        checkpointer(tmp_path).load(whole(tmp_path), {"optimizer": {"hook": 0}})
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "payload",
    [
        pickle.dumps(Exploit()),
        b"ctorch.distributed.checkpoint.filesystem\nos.system\n(S'echo executed'\ntR.",
        pickle.PROTO
        + b"\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93(\x8c\x0decho executedtR.",
        b"ctorch.distributed.checkpoint.filesystem\nFileSystem\n(tR.",
    ],
    ids=["global", "protocol 0", "dotted name", "not a record"],
)
def test_the_map_of_shards_holds_records_only(
    tmp_path: Path, payload: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpointer(tmp_path).save(1, {"model": {"w": torch.ones(3)}}, {}, {})
    committed = whole(tmp_path)
    (committed.path / ".metadata").write_bytes(payload)
    with pytest.raises(ConfigError, match=r"\.metadata of the checkpoint asks for"):
        checkpointer(tmp_path).load(committed, {"model": {"w": torch.ones(3)}})
    assert "executed" not in capfd.readouterr().out


def model(width: int, depth: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    weights = {f"blocks.{block}.weight": torch.ones(width, width, dtype=dtype) for block in range(depth)}
    return {"embedding": torch.ones(9, width, dtype=dtype), "alpha": torch.ones(1)} | weights


@pytest.mark.parametrize(
    ("here", "first", "count"),
    [
        (model(8, 2), "embedding is (9, 4) torch.float32 in the checkpoint and (9, 8)", "6 of 8"),
        (model(4, 3), "blocks.2.weight is absent in the checkpoint and (4, 4)", "2 of 10"),
        (model(4, 1), "blocks.1.weight is (4, 4) torch.float32 in the checkpoint and absent", "2 of 8"),
        (model(4, 2, torch.bfloat16), "(9, 4) torch.float32 in the checkpoint and (9, 4) torch.bfloat16", "6 of 8"),
    ],
    ids=["width", "deeper", "shallower", "dtype"],
)
def test_another_architecture_is_refused(tmp_path: Path, here: dict[str, torch.Tensor], first: str, count: str) -> None:
    there = model(4, 2)
    for step in (1, 2):
        momentum = {name: torch.ones_like(value) for name, value in there.items()}
        checkpointer(tmp_path).save(step, {"optimizer": momentum, "model": there}, {}, {})
    untouched = {name: torch.full_like(value, 5) for name, value in here.items()}
    momentum = {name: torch.full_like(value, 5) for name, value in here.items()}
    tensors = {"optimizer": momentum, "model": untouched}
    with pytest.raises(ConfigError) as error:
        checkpointer(tmp_path).load(whole(tmp_path), tensors)
    message = str(error.value)
    assert message.startswith(f"checkpoint {tmp_path}/step-00000002 belongs to another architecture: ")
    assert message.endswith("write another --name, or the model section that the checkpoint was made with")
    assert "\n" not in message
    assert first in message
    assert f"({count} entries differ)" in message, "weights and their momentum"
    assert all((value == 5).all() for part in tensors.values() for value in part.values()), "something was loaded"


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    weights = {"w": torch.ones(3)}
    checkpointer(tmp_path).save(1, {"model": weights, "optimizer": {"w": {"exp_avg": torch.ones(3)}}}, {}, {})
    with pytest.raises(ConfigError, match=r"another optimizer: w\.momentum is absent .* the optimizer section"):
        checkpointer(tmp_path).load(
            whole(tmp_path), {"model": weights, "optimizer": {"w": {"momentum": torch.ones(3)}}}
        )


@given(steps=st.sets(st.integers(0, 60), max_size=30), keep=st.integers(1, 5), every=st.none() | st.integers(1, 20))
def test_retention(steps: set[int], keep: int, every: int | None) -> None:
    gone = set(expired(steps, keep, every))
    left = steps - gone
    assert gone <= steps
    assert sorted(steps)[-keep:] == sorted(left)[-keep:], "one of the newest is gone"
    assert {step for step in steps if every and step % every == 0} <= left
    assert all(len([later for later in steps if later > step]) >= keep for step in gone)
    newest = sorted(steps)[-keep:]
    assert all(step in newest or (every and step % every == 0) for step in left), "something stays for no reason"


@settings(max_examples=15)
@given(
    gaps=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    keep=st.integers(1, 3),
    every=st.none() | st.integers(1, 8),
)
def test_retention_over_a_run(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], keep: int, every: int | None
) -> None:
    """Pruning save by save leaves what one look at all the steps would."""
    folder = tmp_path_factory.mktemp("run")
    steps = list(np.cumsum(gaps).tolist())
    for step in steps:
        Checkpointer(folder, keep, every).save(step, {"model": {"w": torch.ones(1)}}, {}, {})
    expected = [step for step in steps if step in steps[-keep:] or (every and step % every == 0)]
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in expected]


@pytest.mark.parametrize(("keep", "every", "key"), [(0, None, "checkpoint.keep "), (1, 0, "checkpoint.keep_every ")])
def test_settings_that_cannot_be(tmp_path: Path, keep: int, every: int | None, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        Checkpointer(tmp_path, keep, every)
