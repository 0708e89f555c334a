"""A run's folder: what belongs to it, which keys may differ when it is gone on with, and numbers no run can have."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from models.errors import ConfigError
from pretrain.cli import KEYS, build, load, parse_overrides
from pretrain.config import RunConfig, TrainConfig
from pretrain.distributed import World
from pretrain.run import RunFolder, environment
from tests.runs import REPOSITORY

WORLD = World(0, 1, torch.device("cpu"))

# The decision, key by key: these change where, how fast and how well observed a run is, not what is trained. (data.path
# is held to the prepared text's fingerprint by the source's own state.)
MAY_CHANGE = {
    "runs_dir",
    "device",
    "data.path",
    "data.prefetch",
    "data.verify",
    "train.micro_batch",
    "train.loss_chunk",
    "train.compile",
    "train.cuda_graphs",
    "train.kernels",
    "train.activation_checkpointing",
    "train.checkpoint_every_block",
    "train.rollback.after",
    "train.rollback.sigma",
    "train.rollback.times",
    "parallel.engine",
    "parallel.shard",
    "parallel.shard_size",
    "parallel.prefetch",
    "parallel.zero_stage",
    "parallel.cpu_offload",
    "parallel.silence",
    "parallel.timeout",
    "checkpoint.asynchronous",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "validate.every",
    "validate.sequences",
    "log.every",
    "log.inspect",
    "log.inspect_every",
    "log.tensorboard",
}
MUST_STAY = {"name", "seed", "data.source", "data.sequence_length", "data.document_mask"}
MUST_STAY |= {"train.steps", "train.tokens", "train.batch_tokens", "train.clip", "train.z_loss"}
MUST_STAY |= {"train.skip_norm_sigma", "train.skip_window"}
SECTIONS_THAT_STAY = ("model.", "data.stream.", "optimizer.", "schedule.", "precision.")


def small() -> RunConfig:
    return RunConfig(train=TrainConfig(steps=10))


def changed(key: str) -> RunConfig | None:
    """Another value of the key's type in an otherwise equal configuration; None if the type has no other."""
    config = copy.deepcopy(small())
    *sections, leaf = key.split(".")
    node: Any = config
    for section in sections:
        node = getattr(node, section)
    now, kind = getattr(node, leaf), KEYS[key][1]
    choices = [choice for choice in get_args(kind) if isinstance(choice, str | int) and choice != now]
    first = next((kind for kind in (kind, *get_args(kind)) if kind in (bool, int, float, str)), None)
    other: Any
    if choices:
        other = choices[0]
    elif first is bool:
        other = not now
    elif first in (int, float):
        other = (now or 0) + first(1)
    elif first is str:
        other = f"{now} too"
    elif key in ("optimizer.decay_roles", "optimizer.lr_factors", "model.sites", "log.inspect"):
        other = {"optimizer.decay_roles": ["matrix"], "log.inspect": ["noise"]}.get(key, {"alpha": 0.5})
    elif key.startswith("optimizer.alpha."):
        other = [1, 2]
    else:
        assert len(get_args(kind)) == 1, f"teach this test to change {key}"
        return None
    object.__setattr__(node, leaf, other)  # frozen, and checked as a whole: one key alone may not be possible
    return config


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "some.model"
    path.write_bytes(b"pieces")
    return path


def claim(folder: RunFolder, config: RunConfig, tokenizer: Path, world: World = WORLD) -> None:
    """As a process that comes and goes."""
    try:
        folder.claim(config, tokenizer, world)
    finally:
        folder.release()


def test_every_key_is_decided() -> None:
    staying = {key for key in KEYS if key in MUST_STAY or key.startswith(SECTIONS_THAT_STAY)}
    assert staying | MAY_CHANGE == set(KEYS), "a new key: decide whether a run may be gone on with under another value"
    assert not staying & MAY_CHANGE


@pytest.mark.parametrize("key", KEYS)
def test_a_run_is_gone_on_with_only_as_what_it_is(key: str, tmp_path: Path, tokenizer: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    claim(folder, small(), tokenizer)
    other = changed(key)
    if other is None:
        return
    before = folder.config.read_bytes()
    if key in MAY_CHANGE:
        claim(folder, other, tokenizer)
        assert folder.config.read_bytes() != before, "the folder says how the run goes on"
        return
    with pytest.raises(ConfigError) as raised:
        claim(folder, other, tokenizer)
    assert f"was started with {key} " in str(raised.value)
    assert "\n" not in str(raised.value)
    assert folder.config.read_bytes() == before


def test_the_folder_holds_what_continues_it(tmp_path: Path, tokenizer: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "deep" / "run")
    claim(folder, small(), tokenizer)
    assert load(folder.config) == folder.read_config() == small()
    assert folder.tokenizer.read_bytes() == b"pieces"
    claim(folder, small(), folder.tokenizer)  # data.stream.tokenizer may name the run's own
    assert folder.tokenizer.read_bytes() == b"pieces"
    names = {path.name for path in folder.path.iterdir()}
    assert names == {"config.yaml", "environment.json", "tokenizer.model", "owner"}


def test_folders_that_are_none(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run's folder: it has no config\.yaml"):
        RunFolder(tmp_path).read_config()
    with pytest.raises(ConfigError, match=r"cannot write the run's folder .*: (Not a directory|File exists)"):
        claim(RunFolder(tokenizer / "run"), small(), tokenizer)


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path, tokenizer: Path) -> None:
    one, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    one.claim(small(), tokenizer, WORLD)
    before = one.environment.read_bytes()
    busy = r"another process trains .*run \(host .*\): wait until it ends, or write --name"
    with pytest.raises(ConfigError, match=busy):
        claim(other, small(), tokenizer, World(0, 9, torch.device("cpu")))
    assert one.environment.read_bytes() == before
    assert other.read_config() == small(), "who only reads is not held up"
    one.release()
    claim(other, small(), tokenizer)


def test_environment_says_what_a_reader_needs_to_repeat_the_run(tmp_path: Path, tokenizer: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    claim(folder, small(), tokenizer, World(0, 3, torch.device("cpu")))
    found = json.loads(folder.environment.read_text())
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["numpy"] == metadata.version("numpy")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["world_size"] == 3
    assert (found["cpus"], found["threads"]) == (os.cpu_count(), torch.get_num_threads())
    assert (found["command"], found["host"]) == (sys.orig_argv, os.uname().nodename)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found["git_revision"] == (git.stdout.strip() if git.returncode == 0 else None)
    assert all(found[key] for key in ("device", "system"))


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = environment(WORLD)
    assert (found["git_revision"], found["git_changes"]) == (None, False)


def test_last_validation(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_validation() == {}
    folder.metrics.write_text('{"step": 1, "loss": 5.0}\n')
    assert folder.last_validation() == {}
    with folder.metrics.open("a") as file:
        file.write('{"step": 2, "val_loss": 4.0}\n{"step": 4, "val_loss": 3.0}\n{"step": 5, "loss": 2.0}\n')
    assert folder.last_validation() == {"step": 4, "val_loss": 3.0}


@pytest.mark.parametrize("torn", ['{"step": 6, "val_l', '{"step": 6, "val_loss": 9.0}', "{"])
def test_a_line_that_a_full_disk_tore_is_none(tmp_path: Path, torn: str) -> None:
    """Also one that is whole JSON: MetricsWriter drops it, and the run's step 6 is to come again."""
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 5, "val_loss": 3.0}\n' + torn)
    assert folder.last_validation() == {"step": 5, "val_loss": 3.0}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2 "):
        folder.records()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.loss_chunk", "0"),
        ("train.loss_chunk", "-5"),  # no chunk: a loss of zero
        ("train.clip", "0"),
        ("train.clip", "-1"),  # uphill
        ("train.clip", ".nan"),
        ("train.z_loss", "-1e-4"),
        ("validate.sequences", "0"),
        ("seed", "-1"),
        ("seed", "18446744073709551616"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused_at_once(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is .*: write "):
        build(parse_overrides(["--train.steps", "10", f"--{key}", value]), "here")
