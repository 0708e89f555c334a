"""The health check in real processes, and what it says when one of them has a fault."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import health, readings
from models.errors import ConfigError
from tests.runs import ONE_THREAD, REPOSITORY

ENVIRONMENT = ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}  # ranks on a CPU, also where there are GPUs


def torchrun(*arguments: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command itself on two ranks of this host; ``path``: a folder of programs that are found first."""
    env = ENVIRONMENT if path is None else ENVIRONMENT | {"PATH": f"{path}:{os.environ['PATH']}"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "launch", "health", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120, check=False)


def unhealthy(said: str) -> list[str]:
    return [line.removeprefix("unhealthy: ") for line in said.splitlines() if line.startswith("unhealthy: ")]


def hosts(fault: str, *arguments: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Hosts n1, n2, ... with a rank each and arguments of its own; the fault is the last one's. Leaves no process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = len(arguments)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": f"{size}", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = []
    for rank, given in enumerate(arguments):
        its = fault if rank == size - 1 else ""
        command = [sys.executable, "-m", "tests.launch.test_health", f"n{rank + 1}", its, *given]
        env = ENVIRONMENT | meet | {"RANK": f"{rank}", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        ranks.append(subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=-1, stderr=-1, text=True))
    ended = []
    try:
        for rank, process in enumerate(ranks):
            if fault == "freeze" and rank == size - 1:
                process.kill()
            said = process.communicate(timeout=120)
            ended.append(subprocess.CompletedProcess([], process.returncode, *said))
        return ended
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def faulty_main(host: str, fault: str, arguments: list[str]) -> int:
    """``launch health`` on a host of that name with that fault."""
    socket.gethostname = lambda: host

    def broken(*_: Any) -> float:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    if fault == "freeze":
        readings.read_device = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "die":
        readings.read_device = lambda *_: os._exit(3)
    elif fault == "hang":
        exchange = readings.exchange
        readings.exchange = lambda *given: time.sleep(1000) if given[2] == 1 else exchange(*given)
    elif fault == "break":
        readings.measure_matmul = broken
    elif fault == "blocked":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)
    return health.main(arguments)


def test_two_ranks_are_healthy(tmp_path: Path) -> None:
    done = torchrun(tmp_path / "runs" / "small", "--json", tmp_path / "health.json", "--disk-warn", 0, "--disk-fail", 0)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    host = socket.gethostname()
    assert lines[0].split()[:2] == ["host", "ranks"]
    assert lines[1].split()[:3] == [host, "2", "cpu"]
    assert lines[-1] == "healthy: 2 ranks on 1 hosts"
    assert unhealthy(done.stderr) == []
    found = json.loads((tmp_path / "health.json").read_text())
    assert [finding for finding in found["findings"] if finding["fails"]] == []
    for rank, reading in enumerate(found["readings"]):
        assert reading["place"] == {"rank": rank, "host": host, "device": "cpu", "index": None}
        assert reading["flops"] > 0
        assert reading["all_reduce"] > 0
        assert [met["peer"] for met in reading["exchanges"]] == [1 - rank]
    assert list((tmp_path / "runs" / "small").iterdir()) == [], "what was written to be seen is gone"


def test_a_gpu_with_memory_errors_is_named(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        "  --query-gpu=index,uuid,*) echo '0, GPU-a, 0, No'; echo '1, GPU-b, 3, [N/A]' ;;\n"
        "  *) echo 'not a valid option' >&2; exit 2 ;;\nesac\n"
    )
    program.chmod(0o755)
    done = torchrun(tmp_path / "run", path=tmp_path)
    assert done.returncode == 1
    host = socket.gethostname()
    assert unhealthy(done.stderr) == [
        f"host {host} GPU 1 (GPU-b): 3 uncorrected ECC errors since its driver was loaded"
    ]
    assert "healthy: 2 ranks" not in done.stdout


def test_a_host_that_has_another_folder_of_that_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    ended = hosts("", [str(tmp_path / "run")], [str(tmp_path / "other")])
    assert [one.returncode for one in ended] == [1, 1]
    other = tmp_path / "other"
    [line] = unhealthy(ended[0].stderr)
    assert line == f"host n2: does not see what rank 0 wrote into {other}: it is not the same file system"
    assert unhealthy(ended[1].stderr) == []


@pytest.mark.drill
def test_a_frozen_host_is_named_in_time(tmp_path: Path) -> None:
    ended = hosts("freeze", *[[str(tmp_path), "--timeout", "20"]] * 2)
    assert ended[0].returncode == 1
    assert unhealthy(ended[0].stderr) == ["host n2 rank 1: matrix products: it hangs, or its process ended"]


def test_a_host_whose_process_ended_is_named(tmp_path: Path) -> None:
    ended = hosts("die", *[[str(tmp_path)]] * 3)
    assert [one.returncode for one in ended] == [1, 1, 3]
    assert unhealthy(ended[0].stderr) == ["host n3 rank 2: matrix products: it hangs, or its process ended"]
    assert unhealthy(ended[1].stderr) == []


@pytest.mark.drill
def test_an_exchange_that_hangs_is_named_in_time(tmp_path: Path) -> None:
    """Of n2 with n3, while n1 waits for both."""
    ended = hosts("hang", *[[str(tmp_path), "--timeout", "20"]] * 3)
    assert [one.returncode for one in ended] == [1, 1, 1]
    assert unhealthy(ended[0].stderr) == [
        "host n2 rank 1: exchanges with host n3 rank 2: it hangs, or its process ended",
        "host n3 rank 2: exchanges with host n2 rank 1: it hangs, or its process ended",
    ]
    assert "host n3 rank 2: exchanges with host n2 rank 1 did not end within 20 s" in unhealthy(ended[2].stderr)


def test_a_broken_device_is_named_and_not_asked_to_work_with_others(tmp_path: Path) -> None:
    file = tmp_path / "health.json"
    ended = hosts("break", *[[str(tmp_path), "--json", str(file)]] * 2)
    assert [one.returncode for one in ended] == [1, 1]
    text = "host n2 rank 1: RuntimeError: CUDA error: an illegal instruction was encountered"
    assert unhealthy(ended[0].stderr) == [text]
    assert all(reading["exchanges"] == [] for reading in json.loads(file.read_text())["readings"])


def alone(*arguments: str | Path, fault: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.launch.test_health", "n1", fault, *map(str, arguments)]
    env = ENVIRONMENT | variables
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=90, check=False)


def test_a_full_disk_fails_one_process_too(tmp_path: Path) -> None:
    done = alone(tmp_path, "--disk-fail", 1e9)
    assert done.returncode == 1
    assert [line.split(" GB")[1] for line in unhealthy(done.stderr)] == [
        " free in the run's folder (limit 1e+09",
        f" free in {os.environ.get('TMPDIR', '/tmp')} (limit 1e+09",
    ]


def test_ranks_that_do_not_come_are_not_waited_for(tmp_path: Path) -> None:
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    done = alone(tmp_path, "--timeout", 3, **meet)
    assert done.returncode == 1
    assert unhealthy(done.stderr) == ["host n1 rank 0: not all other ranks came within 3 s"]


def test_signals_that_the_launcher_blocked_end_it(tmp_path: Path) -> None:
    assert alone(tmp_path, fault="blocked").returncode == -signal.SIGTERM


def test_a_file_that_cannot_be_written_is_a_mistake(tmp_path: Path) -> None:
    done = alone(tmp_path, "--json", "no/such/folder/file")
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if not line.startswith(("health: ", "warning: "))]
    assert line.startswith("error: cannot write --json no/such/folder/file: No such file")


@pytest.mark.parametrize(("option", "value"), [("--slow", "2"), ("--timeout", "0")])
def test_an_option_out_of_bounds_is_a_mistake(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option} is {value}: write a "):
        health.parse(["runs/small", option, value])


if __name__ == "__main__":
    sys.exit(faulty_main(sys.argv[1], sys.argv[2], sys.argv[3:]))
