"""The rules of the house, as far as a program can check them. Each test lists what breaks its rule."""

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
ROOMS = ("models", "pretrain", "tools", "launch")  # each may import itself and those before it


def _trees(*places: str) -> dict[str, ast.Module]:
    paths = [path for place in places for path in sorted((REPOSITORY / place).rglob("*.py"))]
    return {str(path.relative_to(REPOSITORY)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


PRODUCT = _trees(*ROOMS)
PROGRAMS = PRODUCT | _trees("tests") | {"setup.py": ast.parse((REPOSITORY / "setup.py").read_text())}
TOOLS = sorted(
    path.stem for path in (REPOSITORY / "tools").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
)
IMPORT_NAMES = {
    "pyyaml": "yaml",
    "protobuf": "google",
}  # what setup.py calls it -> what Python does, where the two differ


def lines_of(name: str) -> list[str]:
    return (REPOSITORY / name).read_text(encoding="utf-8").splitlines()


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of what is imported, anywhere in the file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            assert node.module is not None
            found.add(node.module.split(".")[0])
    return found


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call, dict[str | None, str]]]:
    """(what is called, the call, its keywords), all as written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node, {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_the_helpers_see_what_they_are_there_to_see() -> None:
    tree = ast.parse("import a.b\nfrom c.d import e\ndef f():\n    import g\n    torch.load(x, weights_only=False)")
    assert imports(tree) == {"a", "c", "g"}
    assert [(name, given) for name, _, given in calls(tree)] == [("torch.load", {"weights_only": "False"})]
    assert len(PRODUCT) > 50
    assert {"bench", "evaluate", "generate", "ngram", "prepare", "report", "study", "tokenizer"} <= set(TOOLS)


def test_imports_run_one_way() -> None:
    """launch -> tools -> pretrain -> models; nothing imports tests or, but itself, launch."""
    wrong = []
    for name, tree in PRODUCT.items():
        later = ROOMS[ROOMS.index(name.split("/")[0]) + 1 :]
        wrong += [f"{name} imports {other}" for other in imports(tree) & {*later, "tests"}]
    assert not wrong


def test_what_is_imported_is_declared() -> None:
    """In setup.py, as a requirement or an extra: a fresh machine has nothing else."""
    texts = (
        n.value for n in ast.walk(PROGRAMS["setup.py"]) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )
    required = {found[1].lower() for text in texts if (found := re.match(r"([A-Za-z0-9_-]+)[>=<]", text))}
    known = {IMPORT_NAMES.get(name, name) for name in required} | {*ROOMS}
    wrong = [f"{name}: {imports(tree) - known - sys.stdlib_module_names}" for name, tree in PRODUCT.items()]
    assert not [line for line in wrong if not line.endswith("set()")]


def test_a_file_holds_one_idea() -> None:
    assert not [name for name in PROGRAMS if len(lines_of(name)) > 400]


TRUST = ("False", "trust_remote_code", "arguments.trust_remote_code")  # the user's own option, passed on by its name


def test_no_file_runs_what_it_reads() -> None:
    wrong = []
    for name, tree in PROGRAMS.items():
        for called, call, given in calls(tree):
            bad = called in ("eval", "exec", "os.system", "os.popen")
            bad |= given.get("shell", "False") != "False"
            bad |= given.get("trust_remote_code", "False") not in TRUST
            bad |= called == "torch.load" and given.get("weights_only") != "True"
            bad |= re.fullmatch(r"yaml\.(unsafe|full)_load(_all)?", called) is not None
            bad |= name in PRODUCT and called in ("pickle.load", "pickle.loads")  # not an Unpickler with its own list
            if called in ("yaml.load", "yaml.load_all"):
                loader = given.get("Loader") or ast.unparse(call.args[1])
                module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
                bad |= not issubclass(getattr(module, loader), yaml.SafeLoader)
            wrong += [f"{name}:{call.lineno}"] if bad else []
    assert not wrong


def test_ranks_are_known_in_one_place() -> None:
    """Two files alone read what a launcher puts into the environment."""
    words = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    readers = [
        name
        for name, tree in PRODUCT.items()
        if any(isinstance(node, ast.Constant) and node.value in words for node in ast.walk(tree))
    ]
    assert readers == ["pretrain/distributed.py", "pretrain/rank.py"]


def test_models_open_no_file_and_know_no_rank() -> None:
    for name, tree in PRODUCT.items():
        if name.startswith("models/"):
            assert not {"os", "pathlib", "io", "shutil"} & imports(tree), name
            used = {called.rsplit(".", 1)[-1] for called, _, _ in calls(tree)}
            assert not {"open", "get_rank", "get_world_size", "all_reduce"} & used, name


def test_annotations_are_never_run() -> None:
    wrong = []
    for name, tree in PROGRAMS.items():
        code = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
        future = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
        wrong += [name] if code and not future and not name.endswith("__init__.py") else []
    assert not wrong


def test_no_file_is_unfinished_or_names_a_place() -> None:
    """No notes to self, and no path of the machine that it was written on."""
    note = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b|/ho" r"me/|/wo" r"rk/|/ro" r"ot/")
    assert not [f"{name}: {line}" for name in PROGRAMS for line in lines_of(name) if note.search(line)]


def test_what_is_public_is_documented() -> None:
    """All but ``main``, a function of one statement, and a class that is its fields."""
    wrong = [name for name, tree in PRODUCT.items() if tree.body and not ast.get_docstring(tree)]
    for name, tree in PRODUCT.items():
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            short = isinstance(node, ast.FunctionDef) and (len(node.body) == 1 or node.name == "main")
            fields = isinstance(node, ast.ClassDef) and all(
                isinstance(field, ast.AnnAssign | ast.Assign) for field in node.body
            )
            if not (ast.get_docstring(node) or short or fields):
                wrong.append(f"{name}:{node.lineno} {node.name}")
    assert not wrong


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


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_says_in_one_line_what_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *(["--no-such-option"] if name == "corpora" else [])])
    monkeypatch.delitem(sys.modules, f"tools.{name}", raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"tools.{name}", run_name="__main__")
    said = capsys.readouterr()
    assert left.value.code == 2
    assert said.out == ""
    assert re.fullmatch(rf"error: .*; see python -m tools\.{name} --help\n", said.err)


def test_every_setting_is_documented() -> None:
    """``--help`` prints these."""
    from pretrain.cli import KEYS

    assert not [key for key, (field, _) in KEYS.items() if not field.metadata.get("help")]
