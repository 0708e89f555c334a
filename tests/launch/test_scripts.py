"""What the scripts would do, word for word, without doing it; and what they refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import COMMANDS, main
from pretrain import rank
from tests.runs import ONE_THREAD, REPOSITORY, write_config

LAUNCH = REPOSITORY / "launch"
NAME = 'it\'s $HOME\n  "too" `pwd` \\'  # YAML folds the end of the line into a space
NAMED = 'it\'s $HOME "too" `pwd` \\'


def script(folder: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in ONE_THREAD.items() if not key.startswith("SLURM_")}
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        cwd=folder,
        env=environment | {"LAUNCH_PYTHON": sys.executable, "LAUNCH_RANKS_PER_NODE": "2"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def words(line: str) -> list[str]:
    """As bash reads a command, which is not run."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def stamps(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


def test_torchrun_shows_its_command(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    before = stamps(tmp_path)
    done = script(tmp_path, "torchrun.sh", "--dry-run", "run.yaml", "--name", NAME)
    assert (done.returncode, done.stderr) == (0, "")
    assert stamps(tmp_path) == before
    found = words(done.stdout.removesuffix("\n"))
    assert "torchrun" in found
    assert found[-5:-3] == ["-m", "pretrain"]
    assert [word.replace("$$", "$") for word in found[-3:]] == ["run.yaml", "--name", NAME]
    assert found[found.index("--nproc-per-node") + 1] == "2"
    log = Path(found[found.index("--log-dir") + 1])
    assert log.is_relative_to(tmp_path / "runs" / NAMED / "launches")
    assert config.exists()


def test_submit_shows_its_command(corpus: Path, tmp_path: Path) -> None:
    write_config(tmp_path, corpus)
    before = stamps(tmp_path)
    options = ["--nodes", "4", "--comment", "a 'b' $c\nd"]
    done = script(tmp_path, "submit.sh", "--dry-run", *options, "--", "run.yaml", "--name", NAME)
    assert (done.returncode, done.stderr) == (0, "")
    assert stamps(tmp_path) == before
    found = words(done.stdout.removesuffix("\n"))
    run = tmp_path / "runs" / NAMED
    frozen = found[-1]
    assert re.fullmatch(rf"{re.escape(str(run))}/frozen/[0-9a-f]{{12}}", frozen)
    assert found == [
        "sbatch",
        f"--job-name={NAMED}",
        f"--output={run}/slurm-%j.out",
        *options,
        f"{frozen}/code/launch/train.sbatch",
        "--frozen",
        frozen,
    ]


def test_the_batch_script_shows_its_commands(tmp_path: Path) -> None:
    before = stamps(LAUNCH)
    given = ["a b.yaml", "--name", NAME]
    variables = {"LAUNCH_CONTAINER": "/images/a b.sqsh", "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "3"}
    done = script(REPOSITORY, "train.sbatch", "--dry-run", *given, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert stamps(LAUNCH) == before
    assert not list(REPOSITORY.glob(".launch/*4711"))
    *steps, decide = done.stdout.splitlines()[-3:]
    freeze = done.stdout.split("\nsrun ")[0]
    assert words(freeze) == ["python", "-m", "launch", "freeze", *given]
    for number, line in enumerate(steps):
        found = words(line)
        assert {"--nodes=3", "--ntasks-per-node=1", "--container-image=/images/a b.sqsh"} <= set(found)
        tail = ["bash", "FROZEN/code/launch/node.sh", "node", "LAUNCH", "--address", "HOST", "--port"]
        last = [[*tail, str(rank.port(4711) + 1), "--health"], [*tail, str(rank.port(4711))]][number]
        assert found[-len(last) :] == last
    assert decide == "python -m launch decide LAUNCH  ->  scontrol requeue 4711, or exit"


@pytest.mark.parametrize(
    ("name", "arguments", "variables", "said"),
    [
        ("train.sbatch", ["a.yaml"], {}, "this is a batch script: write sbatch "),
        ("train.sbatch", [], {"SLURM_JOB_ID": "1"}, "no configuration file: write sbatch --nodes N "),
        (
            "train.sbatch",
            ["a.yaml"],
            {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/usr"},
            "no launch/environment.sh in /usr: submit from the checkout's folder",
        ),
        ("submit.sh", [], {}, "write bash launch/submit.sh "),
        ("submit.sh", ["--nodes", "2", "a.yaml"], {}, "write bash launch/submit.sh "),
        ("submit.sh", ["--"], {}, "write bash launch/submit.sh "),
        ("submit.sh", ["--", "nowhere.yaml"], {}, "no configuration file nowhere.yaml"),
        ("torchrun.sh", [], {}, "no configuration file: write bash launch/torchrun.sh "),
        ("torchrun.sh", ["--name", "x"], {}, "no configuration file: write bash launch/torchrun.sh "),
        ("torchrun.sh", ["nowhere.yaml"], {}, "no configuration file nowhere.yaml"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, arguments: list[str], variables: dict[str, str], said: str) -> None:
    done = script(tmp_path, name, *arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_where_code_and_python_come_from(tmp_path: Path) -> None:
    """The code from where the scripts are, Python from the site's file or the folder that one is in."""
    program = 'source "$1/environment.sh"; printf \'%s\\n\' "$LAUNCH_PYTHON" "$PYTHONPATH" "$TRITON_CACHE_DIR"'
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LAUNCH_", "PYTHON", "TRITON"))}

    def sourced(code: Path, **variables: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-euc", program, "-", str(code / "launch")],
            cwd=tmp_path,
            env=kept | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.splitlines()

    code = tmp_path / "some where"
    (code / "launch").mkdir(parents=True)
    (code / "launch/environment.sh").write_bytes((LAUNCH / "environment.sh").read_bytes())
    cache = f"/equipoise-{os.getuid()}/triton"
    assert sourced(code, TMPDIR="/scratch") == ["python3", str(code), f"/scratch{cache}"]
    assert sourced(code, PYTHONPATH="/mine")[1] == f"{code}:/mine"
    for home in (code, tmp_path):  # the working directory's own comes first
        (home / ".venv/bin").mkdir(parents=True)
        (home / ".venv/bin/python").symlink_to(sys.executable)
        assert sourced(code)[0] == str(home / ".venv/bin/python")
    (code / "launch/site.env").write_text("LAUNCH_PYTHON=/opt/python\nLAUNCH_LOCAL_DISK=/fast\n")
    assert sourced(code) == ["/opt/python", str(code), f"/fast{cache}"]
    (tmp_path / "other.env").write_text("LAUNCH_PYTHON=/opt/other\n")
    assert sourced(code, LAUNCH_SITE=str(tmp_path / "other.env"))[0] == "/opt/other"


def test_the_example_site_changes_nothing(tmp_path: Path) -> None:
    """Every line is a comment until somebody needs it."""
    lines = (LAUNCH / "site.example.env").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []


def test_commands_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr()
    assert all(f"  {name} " in said.out for name in COMMANDS)
    assert main([]) == 2
    capsys.readouterr()
    assert main(["statsu"]) == 2
    assert capsys.readouterr().err == "error: launch has no command 'statsu'; did you mean 'status'?\n"
