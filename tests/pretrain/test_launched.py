"""What a run leaves for its launcher: one word, the first, and an exit code that torchrun does not take for a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import launched
from pretrain.__main__ import main
from tests.ranks import fork_server
from tests.runs import ONE_THREAD, REPOSITORY, committed_steps, write_config


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launcher's folder, of which this process was told."""
    folder = tmp_path / "launch"
    folder.mkdir()
    monkeypatch.setenv("EQUIPOISE_LAUNCH", str(folder))
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    assert [path.name for path in folder.iterdir() if path.name != "stop"] == ["outcome.json"], "and nothing beside it"
    return dict(json.loads((folder / "outcome.json").read_text()))


def test_the_first_word_counts(launch: Path) -> None:
    launched.report(3, "at step 7\nthe loss is \u221e", step=7)
    launched.report(0, "finished")
    assert outcome(launch) == {"code": 3, "text": "at step 7\nthe loss is \u221e", "step": 7}


def test_of_many_at_once_one_counts(launch: Path) -> None:
    """Each under a process number of its own, as ranks have."""
    for i in range(20):
        process = os.fork()
        if process == 0:
            launched.report(i, "x" * 5000)
            os._exit(0)
    for _ in range(20):
        os.wait()
    assert outcome(launch)["code"] in range(20)
    assert outcome(launch)["text"] == "x" * 5000


def test_a_disk_that_does_not_take_it_is_no_second_failure(
    launch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQUIPOISE_LAUNCH", str(tmp_path / "gone"))
    launched.report(0, "finished")
    assert not (tmp_path / "gone").exists()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(launch)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        (launch / "filler").write_bytes(bytes(4096))
        monkeypatch.setenv("EQUIPOISE_LAUNCH", str(launch))
        launched.report(0, "finished")
        assert not (launch / "outcome.json").exists(), "half a word is none"
    finally:
        subprocess.run(["umount", str(launch)], check=True)


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_an_agreed_end_is_no_crash_under_a_launcher(code: int, launch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched.folder() == launch
    assert launched.exit_code(code) == 0
    monkeypatch.delenv("EQUIPOISE_LAUNCH")
    assert launched.folder() is None
    assert launched.exit_code(code) == code
    launched.report(code, "nobody asked")
    assert list(launch.iterdir()) == []


DIVERGES = ["--optimizer.lr", "1e30", "--train.clip", "null", "--schedule.warmup_steps", "0"]


@pytest.mark.parametrize(
    ("arguments", "code", "step", "reason"),
    [
        ([], 0, 20, "no"),
        (["--model.deph", "3"], 2, None, None),
        (["--data.path", "nowhere"], 2, None, None),
        (DIVERGES, 3, 1, "no"),
    ],
)
def test_how_a_run_ended(
    corpus: Path,
    tmp_path: Path,
    launch: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    step: int | None,
    reason: str | None,
) -> None:
    config = write_config(tmp_path, corpus)
    assert main([str(config), *arguments]) == 0
    said = capsys.readouterr()
    last = (said.err if code else said.out).splitlines()[-1]
    word = outcome(launch)
    assert (word["code"], word.get("step") is not None, word.get("reason")) == (code, step is not None, reason)
    assert word.get("step", 0) >= (step or 0)
    assert word["text"] == last.removeprefix("error: ")
    monkeypatch.delenv("EQUIPOISE_LAUNCH")
    assert main([str(config), *arguments]) == code


@pytest.mark.parametrize(("place", "reason"), [("launch", "signal"), ("runs/small", "file")])
def test_a_stop_says_who_asked_for_it(
    corpus: Path, tmp_path: Path, launch: Path, capsys: pytest.CaptureFixture[str], place: str, reason: str
) -> None:
    """A launcher starts again after a signal, but not what a person stopped."""
    (tmp_path / "runs/small").mkdir(parents=True)
    (tmp_path / place / "stop").touch()
    assert main([str(write_config(tmp_path, corpus))]) == 0
    text = f"stopped: step 1 of 20, run {tmp_path}/runs/small"
    assert capsys.readouterr().out == text + "\n"
    assert outcome(launch) == {"code": 75, "text": text, "step": 1, "reason": reason}
    assert (tmp_path / place / "stop").exists() == (place == "launch"), "the launcher's is the launcher's"
    assert committed_steps(tmp_path / "runs/small") == [1]


def _interrupted_twice(arguments: list[str], launch: Path, metrics: Path) -> None:
    """In a process of the fork server: two interrupts once it trains."""
    torch.set_num_threads(1)
    os.environ["EQUIPOISE_LAUNCH"] = str(launch)

    def interrupt() -> None:
        while not metrics.exists():
            time.sleep(0.01)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    threading.Thread(target=interrupt, daemon=True).start()
    sys.exit(main(arguments))


def test_who_interrupts_twice_does_not_wait(corpus: Path, tmp_path: Path, launch: Path) -> None:
    """In the middle of a step that takes long, so that the first is not honoured before the second comes."""
    config = write_config(tmp_path, corpus, {"train": {"steps": 100_000, "batch_tokens": 16384}})
    metrics = tmp_path / "runs/small/metrics.jsonl"
    process = fork_server().Process(target=_interrupted_twice, args=([str(config)], launch, metrics))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 130
    word = outcome(launch)
    assert word["code"] == 130
    assert "last committed checkpoint" in word["text"]


def test_the_command_itself(corpus: Path, tmp_path: Path, launch: Path) -> None:
    """A signal that comes while Python still imports, which would end a process that does not expect it."""
    config = write_config(tmp_path, corpus, {"train": {"steps": 100_000}})
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", str(config)],
        cwd=REPOSITORY,
        env=ONE_THREAD | {"EQUIPOISE_LAUNCH": str(launch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not blocks(process.pid, signal.SIGUSR1):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGUSR1)
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert out == f"stopped: step 1 of 100000, run {tmp_path}/runs/small\n"
    assert outcome(launch)["code"] == 75


def blocks(process: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_mistake_is_answered_without_torch(corpus: Path, tmp_path: Path) -> None:
    """Which takes seconds to import: of the configuration, by the run and by its launchers."""
    config = write_config(tmp_path, corpus)
    program = "import sys; sys.modules['torch'] = None; import {0}.__main__ as m; sys.exit(m.main(sys.argv[1:]))"
    for module, before in (("pretrain", []), ("launch", ["local"]), ("launch", ["freeze"])):
        done = subprocess.run(
            [sys.executable, "-c", program.format(module), *before, str(config), "--model.deph", "3"],
            cwd=REPOSITORY,
            env=ONE_THREAD,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr == "error: command line: there is no key 'model.deph'; did you mean 'model.depth'?\n"
        assert not (tmp_path / "runs").exists()


def test_what_models_offers_is_there_at_its_first_use() -> None:
    import models
    from models import config, errors, failures, plan, roles, transformer

    homes = {name: home for home in (config, errors, failures, plan, roles, transformer) for name in vars(home)}
    for name in models.__all__:
        assert getattr(models, name) is getattr(homes[name], name)
    with pytest.raises(AttributeError, match="'models' has no attribute 'Transfomer'"):
        models.Transfomer  # noqa: B018
