"""The command: a study runs and resumes; finished cells stay as they are, stale ones are not believed, and whatever is
stopped can go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.files import write_atomically
from tests.runs import ONE_THREAD, REPOSITORY, committed_steps
from tests.tools import calling
from tests.tools.studied import ran, study, tree, write
from tools import study as command
from tools.studies.grid import StopEarly
from tools.studies.hopeless import verdict
from tools.studies.outcomes import look, read_hopeless
from tools.studies.running import gpu_of, run_cells


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which runs/ comes to lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def on(corpus: Path, steps: int, **changes: Any) -> dict[str, Any]:
    """A study of real runs: one arm with two rates to try, one of which diverges."""
    found = tree(factors={"rate": {"tuned": {"tune": {"optimizer.lr": [0.1, 1e30]}}}}, seeds=[1]) | changes
    found["run"]["data"] = {"sequence_length": 32, "path": str(corpus)}
    found["run"]["train"] |= {"clip": None, "steps": steps}
    found["run"]["log"] = {"every": 1, "tensorboard": False}
    return found


call = partial(calling.call, command.main)


def fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2
) -> str:
    """The one line, which a progress bar may stand before, and the exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, *arguments)
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (code, "")
    lines = said.err.splitlines()
    assert [line for line in lines if line.startswith(("error: ", "stopped: "))] == lines[-1:]
    assert "Traceback" not in said.err
    return lines[-1]


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*-seed*/**/*") if path.is_file()}


def test_a_study_runs_and_resumes(
    corpus: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value learns and one diverges; the first is run again under the final seed. A second call runs nothing."""
    path = write(here, content := on(corpus, 3))
    call(monkeypatch, path)
    printed = capsys.readouterr()
    folder = here / "runs/small"
    names = {"tuned-lr0.1-seed0", "tuned-lr1e+30-seed0", "tuned-lr0.1-seed1"}
    assert {line.split(":")[0] for line in printed.err.splitlines() if "seed" in line} == names
    assert {path.name for path in folder.glob("*-seed*")} == names
    assert "warning: one seed" in printed.out
    results = json.loads((folder / "results.json").read_text())
    (arm,) = results["arms"]
    assert arm["tuned"] == {"optimizer.lr": 0.1}
    last = json.loads((folder / "tuned-lr0.1-seed1/metrics.jsonl").read_text().splitlines()[-1])
    assert arm["seeds"] == {"1": last["val_loss"]}
    assert f"| tuned | optimizer.lr 0.1 **(at the edge)** | {last['val_loss']:.4f} |" in printed.out
    assert results["cells"]["tuned-lr1e+30-seed0"] == "diverged"
    for name in ("report.html", "report.md"):
        assert "at step 2 the loss is nan" in (folder / name).read_text(), name

    before = stamps(folder)
    assert len(before) > 5
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a cell that is over is run again"))
    call(monkeypatch, path)
    assert capsys.readouterr().out == printed.out
    assert stamps(folder) == before

    # A study that was changed under its old name: what lies there answers another question.
    content["run"]["train"]["steps"] = 4
    line = fails(monkeypatch, capsys, write(here, content))
    assert "tuned-lr0.1-seed0 was run with another configuration (train.steps 3, not 4)" in line
    assert stamps(folder) == before


def test_hopeless_cells_stop_and_could_go_on(corpus: Path, here: Path) -> None:
    """Held against a run of the same arm and seed that is said to have been far better at every step."""
    content = on(corpus, 6000, factors={"rate": {"tuned": {"tune": {"optimizer.lr": [0.1, 0.2]}}}})
    content |= {"stop_early": {"after": 0.001, "worse_by": 0.5}}
    found = study(here, **content)
    good, bad = found.tuning()
    ran(good, 1.0, curve=[1.0] * 6000)
    (_, result) = run_cells([good, bad], found.stop_early, 2, lambda result, before: None)
    assert (result.state, result.loss) == ("stopped early", None)
    said = read_hopeless(bad)
    assert (said["best"], said["best_loss"]) == ("tuned-lr0.1-seed0", 1.0)
    assert said["loss"] > 1.5
    (step,) = committed_steps(bad.folder)
    assert said["step"] <= step < 6000
    assert look(bad, found.stop_early).is_over
    assert not (bad.folder / "stop").exists(), "or it would stop again when it goes on"
    # Without the rule, or with one that is milder, it is only unfinished.
    assert look(bad, None).state == "unfinished"
    assert look(bad, StopEarly(after=0.5, worse_by=0.5)).state == "unfinished"


def test_the_rule_for_stopping_by_hand() -> None:
    rule = StopEarly(after=0.3, worse_by=0.5)
    others = {"a": {10: 4.0, 30: 3.0, 40: 2.9}, "b": {10: 3.0, 30: 3.2}}
    assert verdict({10: 9.0}, others, 100, rule) is None, "too early"
    assert verdict({10: 9.0, 30: 3.5}, others, 100, rule) is None, "0.5 is not more than 0.5"
    assert verdict({50: 9.0}, others, 100, rule) is None, "nobody has been there"
    assert verdict({10: 9.0, 50: 9.0}, others, 100, rule) is None, "where others have been it was too early"
    assert verdict({}, others, 100, rule) is None
    assert verdict({30: 9.0}, {}, 100, rule) is None, "an arm's only value"
    expected = {"step": 30, "loss": 3.51, "best": "a", "best_loss": 3.0, "rule": {"after": 0.3, "worse_by": 0.5}}
    assert verdict({10: 3.0, 30: 3.51}, others, 100, rule) == expected
    assert verdict({30: 3.51, 50: 3.0}, others, 100, rule) == expected, "it is ahead of those that are better"


def test_a_study_that_is_asked_to_stop_goes_on_later(corpus: Path, here: Path) -> None:
    path = write(here, on(corpus, 100_000))
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.study", str(path), "--workers", "1"],
        env=ONE_THREAD | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run_folder = here / "runs/small/tuned-lr0.1-seed0"
    try:
        end = time.monotonic() + 150
        while not (run_folder / "metrics.jsonl").exists() or not (run_folder / "metrics.jsonl").read_text():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert (process.returncode, out) == (75, "")
    assert err.splitlines()[-1] == "stopped: asked to stop by SIGTERM; the same command goes on"
    (step,) = committed_steps(run_folder)
    assert 0 < step < 100_000
    (cell, _) = study(here, **on(corpus, 100_000)).tuning()
    assert not look(cell, None).is_over


class Dead:
    """In place of a run's process: it leaves a word, or none, and ends."""

    word: str | None = None
    returncode = 1

    def __init__(self, *arguments: Any, env: dict[str, str], **options: Any) -> None:
        if self.word is not None:
            write_atomically(Path(env["EQUIPOISE_LAUNCH"]) / "outcome.json", self.word.encode())

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None: ...

    def wait(self) -> int:
        return self.returncode


ENDS = {
    "crashed": (None, 2, r"cell llama-tuned-lr0.01-seed0 ended with exit code 1; see runs/small/.*/log.txt"),
    "a mistake": ({"code": 2, "text": "no data there"}, 2, "cell llama-tuned-lr0.01-seed0: no data there"),
    "no validation": ({"code": 0, "text": "finished"}, 2, "llama-tuned-lr0.01-seed0 has no validation loss"),
    "stopped": ({"code": 75, "text": "stopped: step 3"}, 75, "cell llama-tuned-lr0.01-seed0 stopped: step 3; the same"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_cell_that_fails_ends_the_study(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    word, code, expected = ENDS[name]
    monkeypatch.setattr(Dead, "word", None if word is None else json.dumps(word))
    monkeypatch.setattr(subprocess, "Popen", Dead)
    line = fails(monkeypatch, capsys, write(here, tree()), "--workers", "1", code=code)
    assert re.search(expected, line)
    assert len(list(here.glob("runs/small/*/launches"))) == 1, "no other is started"


def test_workers_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_of(3) == {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [gpu_of(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5e")
    assert [gpu_of(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "GPU-5e", "4"]


def test_mistakes_are_one_line_and_leave_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(here, tree())
    assert "--workers is 0" in fails(monkeypatch, capsys, path, "--workers", "0")
    assert "no configuration file" in fails(monkeypatch, capsys, here / "nowhere.yaml")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "scipy" else name)
    assert "needs scipy: pip install scipy" in fails(monkeypatch, capsys, path)
    assert os.listdir(here) == ["study.yaml"]
