"""How a command ends, and what a conversion leaves that is stopped half way: nothing."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from pretrain.checkpoint import tensors
from pretrain.checkpoint.manifest import RecordedFile
from tests.disk import watch
from tests.models.building import tiny
from tests.ranks import fork_server
from tests.tools.converting import run_convert, write_run
from tools import convert
from tools.command import run

_PATIENCE = 60  # seconds for a conversion of some kilobytes and its end


def convert_until(source: Path, destination: Path, target: str, moments: dict[str, signal.Signals]) -> None:
    """A conversion that sends itself a signal at each of some moments: "reading" once there is something of the result,
    amid "writing" a file of a checkpoint, and as it is "clearing" away what there is."""
    partial = destination.with_name(f".{destination.name}.partial")

    def strike(moment: str) -> None:
        if moment in moments:
            os.kill(os.getpid(), moments.pop(moment))

    def see_source(operation: str, path: str) -> None:
        if operation == "open" and any(file.is_file() and file.stat().st_size for file in partial.rglob("*")):
            strike("reading")

    def see_partial(operation: str, path: str) -> None:
        if operation == "shutil.rmtree" and path == str(partial):
            strike("clearing")

    class Striking(RecordedFile):
        def write(self, content: Any) -> int:
            if memoryview(content).nbytes > 4096:
                strike("writing")
            return super().write(content)

    watch(source, see_source)
    watch(partial, see_partial)
    tensors.RecordedFile = Striking
    run(lambda: convert.main([str(source), str(destination), "--to", target]))


def exit_code(*arguments: object) -> int | None:
    process = fork_server().Process(target=convert_until, args=arguments)
    process.start()
    try:
        process.join(_PATIENCE)
        return process.exitcode
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many tensors, each larger than a file's buffer."""
    home = tmp_path_factory.mktemp("source")
    write_run(home / "run", tiny(plan="llama", width=64, depth=4, heads=2))
    return run_convert(home / "run", home / "model", "hf")


@pytest.mark.parametrize("target", ["native", "hf", "torch", "deepspeed"])
@pytest.mark.parametrize(
    ("moments", "code"),
    [
        ({"reading": signal.SIGTERM}, 143),
        ({"reading": signal.SIGTERM, "clearing": signal.SIGTERM}, 143),
        ({"reading": signal.SIGINT}, 130),
    ],
    ids=["terminated", "terminated twice", "interrupted"],
)
def test_a_conversion_that_is_stopped_leaves_nothing(
    source: Path, tmp_path: Path, target: str, moments: dict[str, signal.Signals], code: int
) -> None:
    assert exit_code(source, tmp_path / "out", target, moments) == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_torch_does_not_hide_what_stopped_it(source: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """The handler raises within torch.save, whose own clearing away then fails."""
    assert exit_code(source, tmp_path / "out", "native", {"writing": number}) == code
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_not_stopped_is_there(source: Path, tmp_path: Path) -> None:
    assert exit_code(source, tmp_path / "out", "native", {}) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("a.yaml: no such key: write another"), "error: a.yaml: no such key: write another\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out"), "error: [Errno 28] No space left on device: 'out'\n"),
    ],
    ids=["mistake", "full disk"],
)
def test_what_the_user_can_mend_is_one_line(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        run(main)
    assert (left.value.code, capsys.readouterr().err) == (2, said)


def test_a_defect_of_our_own_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: print(1 / 0))


def test_the_handler_is_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    within: list[object] = []
    run(lambda: within.append(signal.getsignal(signal.SIGTERM)))
    assert within != [before]
    assert signal.getsignal(signal.SIGTERM) is before
