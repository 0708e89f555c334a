"""YAML and command line to a RunConfig: what is read, and the one line for each mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import ConfigError
from pretrain.cli import KEYS, build, dump, flatten, help_text, load, parse_overrides, parse_yaml, read_tree
from pretrain.config import RunConfig, TrainConfig

SMALL = "train: {steps: 3}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_the_dataclasses(write: Any) -> None:
    assert load(write(SMALL)) == RunConfig(train=TrainConfig(steps=3))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {setps: 3}", ["run.yaml", "'train.setps'", "did you mean 'train.steps'"]),
        ("modle: {width: 3}", ["run.yaml", "'modle'", "did you mean 'model'?"]),
        ("optimizer: {learning_rate: 1}", ["'optimizer.learning_rate'"]),
        ("train: {widht: 3}", ["'train.widht'"]),
        ("schedule: {momentum: 0.5}", ["did you mean 'optimizer.momentum'"]),  # the right key in a wrong section
        ("train: 5", ["train is a section", "not 5"]),
        ("train: {steps: many}", ["train.steps is 'many'", "whole number or null"]),
        ("train: {steps: 1.5}", ["train.steps is 1.5", "whole number or null"]),
        ("train: {steps: '3'}", ["train.steps is '3'", "whole number or null"]),
        ("train: {steps: 3, compile: 1}", ["train.compile is 1", "true or false"]),
        ("optimizer: {lr: fast}", ["optimizer.lr is 'fast'", "number"]),
        ("optimizer: {lr: true}", ["optimizer.lr is True", "number"]),
        ("optimizer: {name: adam}", ["optimizer.name is 'adam'", "msgdw | adamw"]),
        ("optimizer: {decay_roles: matrix}", ["optimizer.decay_roles is 'matrix'", "list or null"]),
        ("optimizer: {lr_factors: {alpha: x}}", ["optimizer.lr_factors is 'x'", "mapping"]),
        ("model: {init: {std: fan_out}}", ["model.init.std is 'fan_out'", "number or fan_in"]),
        ("name: [a]", ["name is ['a']", "text"]),
        ("- 3", ["run.yaml", "keys and values"]),
        ("", ["run.yaml", "keys and values"]),
        ("train: {steps: [", ["run.yaml", "not valid YAML"]),
        ("a: 1\n\tb: 2", ["run.yaml", "not valid YAML"]),
        ("x: !!python/object/apply:os.system [true]", ["run.yaml", "not valid YAML"]),
        ("train: {steps: 1, tokens: 2}", ["train.steps and train.tokens are both given"]),
        ("name: x", ["train.steps is missing"]),
        ("train: {steps: 1}\nmodel: {context: 8}", ["data.sequence_length 256", "model.context 8"]),
        ("train: {steps: 1}\nmodel: {heads: 3}", ["model.width 128", "model.heads 3"]),
    ],
)
def test_mistakes_in_a_file(write: Any, text: str, parts: list[str]) -> None:
    text = message(write(text))
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--optimizer.lrr", "1"], ["command line", "'optimizer.lrr'", "did you mean 'optimizer.lr'"]),
        (["--optimizer.lr"], ["--optimizer.lr has no value"]),
        (["optimizer.lr", "1"], ["'optimizer.lr' follows no key"]),
        (["--optimizer.lr", "fast"], ["command line", "optimizer.lr is 'fast'", "number"]),
        (["--model", "{}"], ["command line", "model is a section", "--model."]),
        (["--optimizer.lr", "[1"], ["command line, --optimizer.lr", "not valid YAML"]),
        (["--train.tokens", "5"], ["keep one"]),
        (["--log.every", "10", "5"], ["'5' follows no key"]),
        (["--optimizer.lr_factors", "3", "--optimizer.lr_factors.alpha", "0.1"], ["optimizer.lr_factors"]),
        (["--model.sites", "none", "--model.sites.final", "dyt"], ["model.sites"]),
    ],
)
def test_mistakes_on_the_command_line(write: Any, arguments: list[str], parts: list[str]) -> None:
    text = message(write(SMALL), *arguments)
    assert all(part in text for part in parts), text


def test_override_forms(write: Any) -> None:
    config = load(
        write(SMALL + "optimizer: {lr: 0.5, lr_factors: {gain: 0.5}}\nmodel: {sites: {final: dyt}}\n"),
        [
            *("--optimizer.lr", "3e-4"),
            "--train.micro_batch=2",
            *("--train.batch-tokens", "512"),
            *("--optimizer.decay_roles", "[matrix, head]"),
            *("--optimizer.lr_factors.alpha", "0.1"),
            *("--model.sites.mlp_mid", "{function: dyt, beta: true}"),
            *("--train.clip", "null"),
            *("--train.compile", "true"),
            "--name=a=b",
            *("--train.z_loss", "0"),
            *("--optimizer.momentum", "-1e-3"),
        ],
    )
    assert config.optimizer.lr == 3e-4
    assert (config.train.micro_batch, config.train.batch_tokens, config.train.steps) == (2, 512, 3)
    assert config.optimizer.decay_roles == ["matrix", "head"]
    assert config.optimizer.lr_factors == {"gain": 0.5, "alpha": 0.1}
    assert config.model.sites == {"final": "dyt", "mlp_mid": {"function": "dyt", "beta": True}}
    assert config.train.clip is None
    assert config.train.compile is True
    assert config.name == "a=b"
    assert config.train.z_loss == 0
    assert config.optimizer.momentum == -1e-3


def test_the_last_override_wins(write: Any) -> None:
    assert load(write(SMALL), ["--seed", "1", "--seed", "2"]).seed == 2


@given(
    mantissa=st.integers(0, 999),
    fraction=st.sampled_from(["", ".", ".5", ".25"]),
    exponent=st.integers(-20, 20),
    letter=st.sampled_from("eE"),
    sign=st.sampled_from(["", "+", "-"]),
)
def test_numbers_with_an_exponent_are_numbers(
    mantissa: int, fraction: str, exponent: int, letter: str, sign: str
) -> None:
    text = f"{sign}{mantissa}{fraction}{letter}{exponent}"
    assert parse_yaml(text, "test") == float(text)


@pytest.mark.parametrize("text", ["1e", "e5", "3e-4x", "'3e-4'", "v1e5"])
def test_what_only_resembles_one_stays_text(text: str) -> None:
    assert parse_yaml(text, "test") == text.strip("'")


def test_base_files_are_merged_key_by_key(write: Any) -> None:
    write("seed: 1\nmodel: {width: 64, heads: 2}\noptimizer: {lr: 1.0}\n", "low/one.yaml")
    write("base: one.yaml\nseed: 2\nmodel: {depth: 3}\n", "low/two.yaml")
    write("optimizer: {momentum: 0.5}\nmodel: {heads: 8}\n", "other.yaml")
    path = write("base: [low/two.yaml, other.yaml]\nmodel: {depth: 4}\ntrain: {steps: 1}\n")
    assert read_tree(path) == {
        "seed": 2,
        "model": {"width": 64, "heads": 8, "depth": 4},
        "optimizer": {"lr": 1.0, "momentum": 0.5},
        "train": {"steps": 1},
    }
    assert load(path).model.heads == 8


def test_one_base_by_two_ways_is_no_cycle(write: Any) -> None:
    write("seed: 7\n", "root.yaml")
    write("base: root.yaml\n", "left.yaml")
    write("base: root.yaml\n", "right.yaml")
    assert load(write("base: [left.yaml, right.yaml]\n" + SMALL)).seed == 7


@pytest.mark.parametrize("relative", [False, True])
def test_a_base_cycle_is_told(write: Any, monkeypatch: pytest.MonkeyPatch, relative: bool, tmp_path: Path) -> None:
    write("base: run.yaml\n", "b.yaml")
    path = write("base: b.yaml\n" + SMALL)
    monkeypatch.chdir(tmp_path)
    text = message(Path("run.yaml") if relative else path)
    assert "base leads back" in text
    assert "b.yaml" in text


def test_a_missing_base_and_a_base_that_is_no_file_name(write: Any) -> None:
    write(SMALL, "tiny.yaml")
    text = message(write("base: tinny.yaml\n" + SMALL))
    assert "no configuration file" in text
    assert "tiny.yaml" in text
    for wrong in ("3", "[3]", "{a: b}", "null"):
        assert "base" in message(write(f"base: {wrong}\n" + SMALL))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(SMALL)
    assert "tiny.yaml'?" in message(tmp_path / "tyni.yaml")
    assert "no configuration file" in message(tmp_path / "nowhere" / "run.yaml")
    assert "cannot read" in message(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot read" in message(tmp_path / "binary.yaml")


def leaves(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> default, from an instance of a section: found without the code under test."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value = getattr(cls, field.name)
        inner = leaves(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else None
        found |= {f"{prefix}{field.name}": value} if inner is None else inner
    return found


def test_help_names_every_key_with_type_and_default() -> None:
    text = help_text()
    lines = text.splitlines()
    default = leaves(RunConfig(train=TrainConfig(steps=1))) | {"train.steps": None}
    assert set(default) == set(KEYS)
    for key, value in default.items():
        [line] = [line for line in lines if line.startswith(f"  --{key} ")]
        shown = {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
        assert line.endswith(f"; default {shown})"), line
        kind = line.split("(")[1].split(";")[0]
        assert any(word in kind for word in ("number", "text", "true or false", " | ", "list", "mapping", "fsdp")), line
        assert lines[lines.index(line) + 1].startswith("      "), f"{key} has no explanation"
    assert "--model.width  (whole number, features; default 128)" in text


def test_written_out_and_read_again_it_is_equal(write: Any) -> None:
    config = load(
        write(SMALL),
        [
            *("--optimizer.lr", "1e-9"),
            *("--model.init.std", "fan_in"),
            *("--model.sites", "{final: {function: dyt, beta: true}, embed: none}"),
            *("--optimizer.lr_factors", "{alpha: 3e-4}"),
            *("--optimizer.decay_roles", "[]"),
            *("--name", "'3e-4'"),
            *("--data.path", "'дом: #1'"),
        ],
    )
    text = dump(config)
    assert load(write(text, "again.yaml")) == config
    assert dump(load(write(text, "again.yaml"))) == text
    assert "!!" not in text, "plain YAML"


@settings(max_examples=25)
@given(
    lr=st.floats(1e-12, 1e6),
    name=st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/"), min_size=1
    ).filter(lambda name: not name.startswith(".")),
)
def test_any_value_survives_being_written_out(lr: float, name: str) -> None:
    tree = {"name": name, "train": {"steps": 1}, "optimizer": {"lr": lr}}
    config = build(tree, "test")
    assert build(parse_yaml(dump(config), "test"), "test") == config


def test_flatten_has_every_key_and_value() -> None:
    config = RunConfig(train=TrainConfig(steps=4))
    assert flatten(config) == leaves(config)


def test_parse_overrides_is_a_tree() -> None:
    assert parse_overrides(["--seed", "3", "--model.init.std=0.1"]) == {"seed": 3, "model": {"init": {"std": 0.1}}}
    assert parse_overrides([]) == {}
