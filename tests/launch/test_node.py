"""torchrun's command line and environment, and the signals that a node's agent turns into a file."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.utils import macros

from launch import node
from launch.launches import Launch
from launch.node import main, plan, show
from models.errors import ConfigError
from tests.ranks import fork_server

WORDS = ["it's a.yaml", "--name", 'two  spaces, "quotes", $HOME, `pwd`, \\ and\na line']


def launch(run: Path, arguments: list[str] | None = None) -> Launch:
    return Launch(str(run), WORDS if arguments is None else arguments, "code", time.time(), 0, ["n1"], "7", 0)


@pytest.fixture(autouse=True)
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_RANKS_PER_NODE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def option(options: list[str], name: str) -> str:
    assert options.count(name) == 1
    return options[options.index(name) + 1]


def test_what_torchrun_is_told(tmp_path: Path) -> None:
    one = launch(tmp_path)
    settings, options = plan(one, ["--nnodes", "3"])
    assert options[:2] == ["--nnodes", "3"]
    assert option(options, "--nproc-per-node") == "2"
    assert option(options, "--max-restarts") == "0", "SLURM starts again, with other hosts"
    assert Path(option(options, "--log-dir")) == one.folder / "ranks" / socket.gethostname()
    assert (option(options, "--redirects"), option(options, "--tee")) == ("3", "0:3")
    assert macros.substitute(options[options.index("-m") :], "0") == ["-m", "pretrain", *WORDS]
    assert settings["EQUIPOISE_LAUNCH"] == str(one.folder)
    assert int(settings["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_other_nodes_are_not_shown(tmp_path: Path) -> None:
    assert "--tee" not in plan(launch(tmp_path), [], first=False)[1]


def test_the_health_check_is_no_run(tmp_path: Path) -> None:
    """It leaves no word of its own that a run ended, and keeps its logs apart."""
    one = launch(tmp_path)
    settings, options = plan(one, [], health=True)
    assert "EQUIPOISE_LAUNCH" not in settings
    assert options[options.index("-m") :][:4] == ["-m", "launch", "health", str(tmp_path)]
    assert Path(option(options, "--log-dir")).parent == one.folder / "health"


def test_what_the_user_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in plan(launch(tmp_path), [])[0]


def test_without_a_number_there_is_a_rank_for_each_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for value in ("", None):
        if value is None:
            monkeypatch.delenv("LAUNCH_RANKS_PER_NODE")
        else:
            monkeypatch.setenv("LAUNCH_RANKS_PER_NODE", value)
        for devices, ranks in ((0, "1"), (8, "8")):
            monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
            assert option(plan(launch(tmp_path), [])[1], "--nproc-per-node") == ranks


@pytest.mark.parametrize("value", ["0", "-1", "all", "2.5"])
def test_a_number_of_ranks_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LAUNCH_RANKS_PER_NODE", value)
    with pytest.raises(ConfigError, match="LAUNCH_RANKS_PER_NODE"):
        plan(launch(tmp_path), [])


def test_what_is_shown_is_what_a_shell_reads(tmp_path: Path) -> None:
    settings, options = plan(launch(tmp_path), ["--standalone"])
    line = show(settings, options)
    words = [*(f"{key}={value}" for key, value in settings.items()), "torchrun", *options]
    assert shlex.split(line) == words
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == words


def test_arguments_reach_the_ranks_as_they_are(tmp_path: Path) -> None:
    """torchrun puts a rank's number for ${local_rank}, and takes $$ for $ (string.Template)."""
    words = ["c.yaml", "--name", "a$$b $HOME ${local_rank} $"]
    _, options = plan(launch(tmp_path, words), [])
    given = options[options.index("pretrain") + 1 :]
    assert macros.substitute(given, "0") == words


def test_outside_a_job_it_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = launch(tmp_path)
    one.create()
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    monkeypatch.setattr(node, "torchrun", lambda *rest, **more: 0)
    with pytest.raises(ConfigError):
        main([str(one.folder), "--address", "n1", "--port", "20000"])


def test_a_node_s_place_in_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = launch(tmp_path)
    one.create()
    seen = []
    monkeypatch.setattr(node, "torchrun", lambda *rest, **more: seen.append((*rest, more)) or 0)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("SLURM_NODEID", rank)
        assert main([str(one.folder), "--address", "n1", "--port", "20142"]) == 0
    for rank, (read, place, more) in enumerate(seen):
        assert read == one
        assert (option(place, "--nnodes"), option(place, "--node-rank")) == ("2", str(rank))
        assert (option(place, "--master-addr"), option(place, "--master-port")) == ("n1", "20142")
        assert more == {"first": rank == 0, "health": False}


def _agent(one: Launch, numbers: list[int]) -> None:
    """What torchrun does before and around its ranks, and signals that come to it; 7 if it is not ended by them."""
    import threading

    signal.pthread_sigmask(signal.SIG_BLOCK, node.ASKING)
    threading.Thread(target=node._pass_on, args=(one,), daemon=True).start()
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.2)
    os._exit(7)


@pytest.mark.parametrize(
    ("numbers", "code", "first"),
    [
        ([signal.SIGTERM], 7, "SIGTERM"),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1], 7, None),
        ([signal.SIGINT], 7, "SIGINT"),
        ([signal.SIGINT, signal.SIGINT], -signal.SIGHUP, "SIGINT"),
        ([signal.SIGTERM, signal.SIGINT], 7, None),
    ],
)
def test_signals_become_a_file(tmp_path: Path, numbers: list[int], code: int, first: str | None) -> None:
    one = launch(tmp_path)
    one.create()
    process = fork_server().Process(target=_agent, args=(one, numbers))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == code
    said = (one.folder / "stop").read_text()
    assert said.endswith(f" on {socket.gethostname()}\n")
    assert first is None or said.startswith(first)


def test_a_disk_that_does_not_take_the_file_ends_no_agent(tmp_path: Path) -> None:
    process = fork_server().Process(target=_agent, args=(launch(tmp_path / "gone"), [signal.SIGTERM, signal.SIGTERM]))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 7


def test_a_dry_run_only_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = launch(tmp_path)
    one.create()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert main([str(one.folder), "--address", "n1", "--port", "20000", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert option(words, "--node-rank") == "1"
    assert macros.substitute(words[words.index("-m") :], "0") == ["-m", "pretrain", *WORDS]
    assert sorted(tmp_path.rglob("*")) == before
