"""A study as arrays: what is submitted, word for word, and which cell an element is. tests/cluster has a real one."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from pretrain.cli import load
from tests.tools.studied import ran, study, tree, write
from tools import study as command
from tools.studies import array
from tools.studies.array import cell_of, submit
from tools.studies.grid import Study, read_study

OPTIONS = ["--partition=gpu", "--nodes", "2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sbatch(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of SLURM's: it numbers jobs from 101 on; the file that is returned has its arguments, a line a call."""
    log, program = here / "submitted", here / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\nprintf "%q " "$@" >>{log}\necho >>{log}\necho "$((100 + $(wc -l <{log})));c"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(array, "_freeze", lambda folder, dry: Path("runs/small/frozen/abc"))
    (here / "runs/small").mkdir(parents=True)
    return log


def lines(log: Path) -> list[list[str]]:
    return [shlex.split(line) for line in log.read_text().splitlines()]


def tune(found: Study, less: int = 0) -> None:
    """0.1 is the best of every arm. The last ``less`` cells are not run."""
    for cell in found.tuning()[: len(found.tuning()) - less]:
        ran(cell, 3.0 if dict(cell.tuned)["optimizer.lr"] == 0.1 else 4.0)


def test_what_is_submitted_first(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(sbatch.parent, tree())
    submit(path, OPTIONS, 4, dry=False)
    tuning, final, report = lines(sbatch)
    (file,) = Path("runs/small").glob("submitted-*.yaml")
    script = ["runs/small/frozen/abc/code/launch/study.sbatch", "runs/small/frozen/abc", str(file)]
    output = "--output=runs/small/slurm-{}.out"
    assert tuning == [
        *("--parsable", "--job-name=small-tuning", output.format("tuning-%A_%a"), *OPTIONS, "--array=0-5%4"),
        *(*script, "tuning"),
    ]
    assert final == [
        *("--parsable", "--job-name=small-final", output.format("final-%A_%a"), *OPTIONS, "--array=0-5%4"),
        *("--dependency=afterany:101", *script, "final"),
    ]
    assert report == [
        *("--parsable", "--job-name=small-report", output.format("report-%j"), *OPTIONS),
        *("--dependency=afterany:102", *script, "report"),
    ]
    said = capsys.readouterr().out.splitlines()
    assert said == ["tuning: job 101, 6 cells", "final: job 102, 6 cells", "report: job 103"]
    # What the job reads is the study as it was submitted, whatever becomes of the file.
    assert read_study(file) == read_study(path)
    path.write_text("")
    assert len(read_study(file).tuning()) == 6


def test_only_what_is_missing_is_submitted_again(sbatch: Path) -> None:
    found = study(sbatch.parent)
    tune(found, less=3)
    submit(sbatch.parent / "study.yaml", [], None, dry=False)
    assert [word for line in lines(sbatch) for word in line if word.startswith("--array")] == [
        "--array=3-5",
        "--array=0-5",
    ]
    tune(found)
    for i in (0, 2, 5):
        cell = cell_of(found, "final", i)
        assert cell is not None
        ran(cell, 3.0)
    sbatch.unlink()
    submit(sbatch.parent / "study.yaml", [], None, dry=False)
    final, report = lines(sbatch)
    assert "--array=1,3-4" in final
    assert not any(word.startswith("--dependency") for word in final)
    assert "--dependency=afterany:101" in report
    sbatch.unlink()
    for i in (1, 3, 4):
        cell = cell_of(found, "final", i)
        assert cell is not None
        ran(cell, 3.0)
    submit(sbatch.parent / "study.yaml", [], None, dry=False)
    (report,) = lines(sbatch)
    assert report[-1] == "report"


def test_a_study_without_tuning_seeds_is_one_array(sbatch: Path) -> None:
    submit(write(sbatch.parent, tree(tune_seeds=None)), [], None, dry=False)
    tuning, report = lines(sbatch)
    assert "--array=0-17" in tuning
    assert report[-1] == "report"


def test_elements_are_cells(here: Path) -> None:
    found = study(here)
    assert [cell_of(found, "tuning", i) for i in range(6)] == found.tuning()
    tune(found, less=1)
    with pytest.raises(ConfigError, match=r"dnt tuned has cells still to be tuned \(dnt-tuned-lr1-seed0\)"):
        cell_of(found, "final", 3)
    tune(found)
    cells = [cell_of(found, "final", i) for i in range(6)]
    assert [cell.config.name for cell in cells if cell is not None] == [
        f"{plan}-tuned-lr0.1-seed{seed}" for plan in ("llama", "dnt") for seed in (1, 2, 3)
    ]
    for cell in found.tuning()[3:]:
        ran(cell, None)
    assert cell_of(found, "final", 4) is None, "every value of its arm diverged"


def test_what_the_batch_script_asks(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = study(here)

    def ask(*arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["array", "study.yaml", *map(str, arguments)])
        array.main()
        return capsys.readouterr().out

    printed = ask("tuning", 1)
    assert printed == "runs/small/llama-tuned-lr0.1-seed0/cell.yaml\n"
    assert load(Path(printed.strip())) == found.tuning()[1].config
    ran(found.tuning()[1], 3.0)
    assert ask("tuning", 1) == "", "it is over"
    assert ask("tuning", 1, "--watch") == "", "there is no rule to stop it by"


def test_an_element_is_watched_until_it_is_asked_to_stop_or_its_job_ends(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = study(here, stop_early={"after": 0.3, "worse_by": 0.5})
    good, bad = found.tuning()[:2]
    ran(good, 3.0)
    bad.folder.mkdir(parents=True)
    lines = (good.folder / "metrics.jsonl").read_text().splitlines(keepends=True)

    shown = iter([4, 7])

    def wait(*arguments: Any) -> tuple[list[Any], ...]:
        """The run goes on meanwhile, no worse at first and then by far; and then its job ends."""
        if (steps := next(shown, None)) is None:
            return ([sys.stdin], [], [])
        text = "".join(lines[:steps])
        (bad.folder / "metrics.jsonl").write_text(text.replace('"loss": 4.95', f'"loss": {worse}'))
        return ([], [], [])

    monkeypatch.setattr(array.select, "select", wait)
    monkeypatch.setattr(sys, "argv", ["array", "study.yaml", "tuning", "1", "--watch"])
    worse = 5.0
    array.main()
    assert next(shown, None) is None
    assert not (bad.folder / "stop").exists()
    shown, worse = iter([4, 7]), 8.0
    array.main()
    assert (bad.folder / "stop").exists()


def test_a_dry_run_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real freeze; sbatch need not be there."""
    path = write(here, tree(name="it's 5%"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(sys, "argv", ["study", str(path), "--workers", "2", "--slurm", "--dry-run", *OPTIONS])
    command.main()
    tuning, final, report = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    assert tuning[0] == "sbatch"
    assert "--output=runs/it's 5%%/slurm-tuning-%A_%a.out" in tuning
    assert "--array=0-5%2" in tuning
    assert tuning[-4].startswith("runs/it's 5%/frozen/")
    assert tuning[-4].endswith("/code/launch/study.sbatch")
    assert {*OPTIONS} <= {*final}
    assert "--dependency=afterany:TUNING" in final
    assert "--dependency=afterany:FINAL" in report
    assert [path.name for path in here.iterdir()] == ["study.yaml"]


def test_a_dry_run_is_of_arrays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study", str(write(here, tree())), "--dry-run"])
    with pytest.raises(ConfigError, match="write --slurm too"):
        command.main()
    assert [path.name for path in here.iterdir()] == ["study.yaml"]


def test_mistakes(sbatch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(sbatch.parent, tree())
    (sbatch.parent / "bin/sbatch").write_text("#!/bin/sh\necho 'invalid\npartition' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="sbatch refuses: invalid partition"):
        submit(path, [], None, dry=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        submit(path, [], None, dry=False)
