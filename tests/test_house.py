"""The rules of the house, as far as a program can check them."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
ROOMS = ("models", "pretrain", "tools")  # each may import itself and those before it
FILES = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
PROGRAMS = [*FILES, *sorted((REPOSITORY / "tests").rglob("*.py")), REPOSITORY / "setup.py"]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PROGRAMS}
NAMES = {path: str(path.relative_to(REPOSITORY)) for path in PROGRAMS}
TOOLS = sorted(
    path.stem for path in (REPOSITORY / "tools").glob("*.py") if '__name__ == "__main__"' in path.read_text()
)

# What setup.py calls it -> what Python does, where the two differ.
IMPORT_NAMES = {"pyyaml": "yaml"}


def by_name(path: Path) -> str:
    return NAMES[path]


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of what is imported, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            assert node.module is not None
            yield node.module.split(".")[0]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(what is called as written, the call)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(REPOSITORY).parts[0]
    forbidden = {*ROOMS[ROOMS.index(room) + 1 :], "tests", "launch"}
    assert not forbidden & set(imports(TREES[path]))


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_what_is_imported_is_declared(path: Path) -> None:
    """In setup.py, as a requirement or an extra: a fresh machine has nothing else."""
    setup = TREES[REPOSITORY / "setup.py"]
    strings = (node.value for node in ast.walk(setup) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    required = {found[1].lower() for text in strings if (found := re.match(r"([A-Za-z0-9_-]+)[>=<]", text))}
    declared = {IMPORT_NAMES.get(name, name) for name in required}
    assert set(imports(TREES[path])) <= declared | set(ROOMS) | sys.stdlib_module_names


@pytest.mark.parametrize("path", PROGRAMS, ids=by_name)
def test_a_file_holds_one_idea(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", PROGRAMS, ids=by_name)
def test_no_file_runs_code_that_it_reads(path: Path) -> None:
    for name, call in calls(TREES[path]):
        last = name.rsplit(".", 1)[-1]
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", f"line {call.lineno}"
        if name in ("yaml.load", "yaml.load_all"):
            loader = keyword(call, "Loader") or ast.unparse(call.args[1])
            kind = getattr(importlib.import_module(_module(path)), loader)
            assert issubclass(kind, yaml.SafeLoader), f"line {call.lineno}"
        assert not (name.startswith("yaml.") and last.startswith(("unsafe_", "full_"))), f"line {call.lineno}"
        assert keyword(call, "trust_remote_code") in (None, "False"), f"line {call.lineno}"
        assert keyword(call, "shell") in (None, "False"), f"line {call.lineno}"
        assert name not in ("eval", "exec", "os.system", "os.popen"), f"line {call.lineno}"
        if path in FILES:
            assert name not in ("pickle.load", "pickle.loads"), (
                f"line {call.lineno}: an Unpickler with a list of classes"
            )


def test_the_rules_would_notice() -> None:
    """The helpers see what they are there to see."""
    tree = ast.parse("import a.b\nfrom c.d import e\ndef f():\n    import g\n    torch.load(x, weights_only=False)")
    assert list(imports(tree)) == ["a", "c", "g"]
    ((name, call),) = calls(tree)
    assert (name, keyword(call, "weights_only"), keyword(call, "shell")) == ("torch.load", "False", None)


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_ranks_are_known_in_one_place(path: Path) -> None:
    """pretrain/distributed.py alone reads what a launcher puts into the environment."""
    words = {node.value for node in ast.walk(TREES[path]) if isinstance(node, ast.Constant)}
    if NAMES[path] != "pretrain/distributed.py":
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & words


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_models_open_no_file_and_know_no_rank(path: Path) -> None:
    if NAMES[path].startswith("models/"):
        assert not {"os", "pathlib", "io", "shutil"} & set(imports(TREES[path]))
        assert "open" not in [name for name, _ in calls(TREES[path])]
        assert "get_rank" not in path.read_text()


@pytest.mark.parametrize("path", PROGRAMS, ids=by_name)
def test_annotations_are_not_run(path: Path) -> None:
    tree = TREES[path]
    code = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if code:
        assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)


@pytest.mark.parametrize("path", PROGRAMS, ids=by_name)
def test_no_file_is_unfinished(path: Path) -> None:
    assert not re.search(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", path.read_text(encoding="utf-8"))


def _module(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", [p for p in FILES if p.read_text().strip()], ids=by_name)
def test_what_is_public_is_documented(path: Path) -> None:
    """The file, its public classes and functions, and their public methods where the name and the type are not all."""
    tree = TREES[path]
    assert ast.get_docstring(tree), "the file says what it is"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or f"{NAMES[path]}:{node.name}" in PLAIN, node.name


PLAIN: set[str] = set()


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", "--help"])
    monkeypatch.delitem(sys.modules, f"tools.{name}", raising=False)  # runpy warns of a module that is there already
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"tools.{name}", run_name="__main__")
    said = capsys.readouterr()
    assert left.value.code in (0, None)
    assert said.out.startswith(f"usage: python -m tools.{name} ")
    assert said.err == ""


def test_the_tools_that_others_rely_on_are_there() -> None:
    assert {"bench", "evaluate", "generate", "ngram", "prepare", "report", "study", "tokenizer"} <= set(TOOLS)


def test_settings_are_documented() -> None:
    """``--help`` prints these."""
    from pretrain.cli import KEYS

    assert not [key for key, (field, _) in KEYS.items() if not field.metadata.get("help")]
