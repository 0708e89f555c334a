"""From YAML files and the command line to a RunConfig: overrides, checks, and a help text made from the fields."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pydantic
import yaml

from models.errors import ConfigError, nearest
from pretrain.config import RunConfig

USAGE = """\
python -m pretrain CONFIG.yaml [--section.key value ...]
torchrun --nproc-per-node N -m pretrain CONFIG.yaml [--section.key value ...]

Trains what the configuration says, or goes on with the run of that name from its last committed checkpoint.
A configuration is YAML; `base: FILE`, or a list of files, takes another's keys first (paths beside the file itself).
A value on the command line is YAML too: null, 3e-4, [matrix, head], {alpha: 0.1}.
Exit codes: 0 finished; 2 a mistake in what was given; 3 the loss is no longer finite; 75 stopped on request after a
committed checkpoint, start again to continue. Under torchrun all but 0 become 1: the line printed tells which.
"""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as a string, because it has no dot; here it is the number that it looks like."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that _Loader would take for a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def parse_yaml(text: str, where: str) -> Any:
    """Safe YAML, with 3e-4 a number; a mistake in it is one line that begins with ``where``."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``, section by section."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a configuration file over those of its bases."""
    if path in seen:
        raise ConfigError(f"{path}: base leads back to the file itself; remove one of {', '.join(map(str, seen))}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        beside = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(
            f"no configuration file {path}" + (f"; {nearest(str(path), beside)}" if beside else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: write keys and values, as in configs/tiny.yaml")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError(f"{path}: base is {bases!r}: write a file's name, or a list of them")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read_tree((path.parent / base).resolve(), (*seen, path)))
    return merge(merged, tree)


def _sections(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(dotted key, field, type) of every key that is not itself a section."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _sections(kind, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, kind


KEYS: dict[str, tuple[dataclasses.Field[Any], Any]] = {k: (f, t) for k, f, t in _sections(RunConfig)}
SECTIONS = sorted({key[:i] for key in KEYS for i, letter in enumerate(key) if letter == "."})
_DICT_KEYS = tuple(f"{k}." for k, (field, _) in KEYS.items() if field.default_factory is dict)


def _check_keys(tree: Mapping[str, Any], where: str, prefix: str = "") -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in KEYS:
            continue
        if key not in SECTIONS:
            raise ConfigError(f"{where}: there is no key {key!r}; {nearest(key, [*KEYS, *SECTIONS])}")
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} is a section: write keys under it, not {value!r}")
        _check_keys(value, where, f"{key}.")


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """``--a.b value`` and ``--a.b=value`` as a tree."""
    tree: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"command line: {flag!r} follows no key; write --section.key value")
        key, equals, text = flag[2:].partition("=")
        key = key.replace("-", "_")
        if key in SECTIONS:
            raise ConfigError(f"command line: {key} is a section: write --{key}.KEY VALUE")
        if key not in KEYS and not key.startswith(_DICT_KEYS):
            raise ConfigError(f"command line: there is no key {key!r}; {nearest(key, KEYS)}")
        if not equals:
            if not rest:
                raise ConfigError(f"command line: --{key} has no value; write --{key} VALUE")
            text = rest.pop(0)
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"command line: --{key} goes into a mapping, but another option makes it {node!r}")
        node[leaf] = parse_yaml(text, f"command line, --{key}")
    return tree


def build(tree: Mapping[str, Any], where: str) -> RunConfig:
    """A checked RunConfig; every mistake is a ConfigError of one line."""
    _check_keys(tree, where)
    try:
        # Through JSON, because strict validation of Python objects wants instances of the sections, not mappings.
        return _schema().validate_json(json.dumps(tree, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        parts = [str(part) for part in first["loc"]]
        while parts and ".".join(parts) not in KEYS:  # pydantic appends which member of a union it tried
            parts.pop()
        key = ".".join(parts) or ".".join(str(part) for part in first["loc"])
        wanted = type_name(KEYS[key][1]) if key in KEYS else first["msg"]
        raise ConfigError(f"{where}: {key} is {first['input']!r}: write {wanted}") from None


@functools.cache
def _schema() -> pydantic.TypeAdapter[RunConfig]:
    """Made once: a study builds hundreds of configurations."""
    return pydantic.TypeAdapter(RunConfig)


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of ``path`` with the command line's overrides."""
    tree = read_tree(path)
    _check_keys(tree, str(path))
    return build(merge(tree, parse_overrides(overrides)), str(path) if not overrides else f"{path} and command line")


def type_name(kind: Any) -> str:
    """A type as a person writes it: ``a number``, ``cosine | linear``, ``whole number or null``."""
    simple = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    if kind in simple:
        return simple[kind]
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return " | ".join(map(str, arguments))
    origin = getattr(kind, "__origin__", None)
    if origin is list:
        return "list"
    if origin is dict:
        return "mapping"
    return " or ".join(type_name(a) for a in arguments)


def dump(config: RunConfig) -> str:
    """The complete configuration as YAML that ``load`` reads back to an equal one."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, as in ``KEYS``."""

    def value(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        return node

    return {key: value(key) for key in KEYS}


def help_text() -> str:
    """Every key with type, default, unit and meaning."""
    lines = [USAGE]
    section = ""
    for key, (field, kind) in KEYS.items():
        head = key.rsplit(".", 1)[0] if "." in key else ""
        if head != section:
            section = head
            lines.append(f"\n{section}")
        if field.default is not dataclasses.MISSING:
            default = field.default
        else:
            assert field.default_factory is not dataclasses.MISSING
            default = field.default_factory()
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        unit = f", {field.metadata['unit']}" if field.metadata["unit"] else ""
        lines.append(f"  --{key}  ({type_name(kind)}{unit}; default {shown})")
        lines.append(textwrap.fill(field.metadata["help"], 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines) + "\n"
