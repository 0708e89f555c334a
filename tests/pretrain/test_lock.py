"""A run's folder has one owner, whoever asks from wherever; a dead one is taken over, a living one never is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from pretrain import lock as module
from pretrain.lock import FolderLock, Owner, beating, newest
from pretrain.watchdog import period_of
from tests.ranks import fork_server

SILENCE = 0.5  # seconds; a period is a fifth of it
PATIENCE = SILENCE + 4 * period_of(SILENCE)
AT_ONCE = PATIENCE / 2  # far less than a wait, far more than a few files cost


@contextmanager
def held(folder: Path, silence: float = SILENCE) -> Iterator[FolderLock]:
    lock = FolderLock(folder, silence)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def acquire_in(folder: Path, silence: float = SILENCE) -> float:
    """Seconds until the folder was had."""
    begin = time.monotonic()
    with held(folder, silence):
        return time.monotonic() - begin


def write_owner(folder: Path, owner: Owner, number: int = 1) -> Path:
    path = folder / "owner" / f"{number:08d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(owner)))
    return path


def elsewhere(**changes: Any) -> Owner:
    """An owner on another machine, whose process has the number of one that lives here."""
    return replace(Owner.here(SILENCE), **({"host": "far", "machine": "another boot"} | changes))


@contextmanager
def stranger() -> Iterator[tuple[subprocess.Popen[bytes], Owner]]:
    """A living process of this machine, and how it would sign as an owner. It is no child's zombie until reaped."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5), field 22
            yield process, replace(Owner.here(SILENCE), process=process.pid, started=started)
        finally:
            process.kill()


# ---------------------------------------------------------------------- on this machine


def test_the_second_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with held(tmp_path) as lock:
        begin = time.monotonic()
        with pytest.raises(ConfigError) as raised:
            FolderLock(tmp_path, SILENCE).acquire()
        assert time.monotonic() - begin < AT_ONCE
        text = str(raised.value)
        assert f"another process trains {tmp_path} (host {os.uname().nodename}, process {os.getpid()}, since " in text
        assert "write --name" in text
        assert "\n" not in text
        assert lock.is_ours
    assert acquire_in(tmp_path) < AT_ONCE, "released"


def test_the_job_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with held(tmp_path), pytest.raises(ConfigError, match=r"SLURM job 4711"):
        FolderLock(tmp_path, SILENCE).acquire()


def test_release_may_come_twice_or_for_nothing(tmp_path: Path) -> None:
    FolderLock(tmp_path, SILENCE).release()
    with held(tmp_path) as lock:
        lock.release()
        with held(tmp_path) as other:
            lock.release()
            assert other.is_ours


def _hold(folder: Path, silence: float, machine: str | None, line: Any, errors: Path) -> None:
    """Hold the folder until told to release it, or for ever."""
    with errors.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    if machine is not None:
        module._machine = lambda: machine
    lock = FolderLock(folder, silence)
    lock.acquire()
    line.send("held")
    line.recv()
    lock.release()
    line.send("released")
    line.recv()


@contextmanager
def another_process(folder: Path, machine: str | None = None) -> Iterator[tuple[Any, Any, Path]]:
    """It holds the folder: the process, a line to it, and what it prints on standard error."""
    context = fork_server()
    here, there = context.Pipe()
    errors = folder.with_name(folder.name + ".errors")
    process = context.Process(target=_hold, args=(folder, SILENCE, machine, there, errors))
    process.start()
    try:
        there.close()
        assert here.poll(60), "it does not start"
        assert here.recv() == "held"
        yield process, here, errors
    finally:
        process.kill()
        process.join()


def test_another_process_holds_it_until_it_releases(tmp_path: Path) -> None:
    with another_process(tmp_path) as (process, line, _):
        with pytest.raises(ConfigError, match=rf"another process trains .*, process {process.pid}, since"):
            FolderLock(tmp_path, SILENCE).acquire()
        line.send("release")
        assert line.recv() == "released"
        assert process.is_alive()
        assert acquire_in(tmp_path) < AT_ONCE


def test_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    with another_process(tmp_path) as (process, _, _):
        process.kill()
        process.join()
        assert acquire_in(tmp_path) < AT_ONCE


def test_neither_does_a_zombie(tmp_path: Path) -> None:
    with stranger() as (process, owner):
        write_owner(tmp_path, owner)
        with pytest.raises(ConfigError, match=rf"process {process.pid}, "):
            FolderLock(tmp_path, SILENCE).acquire()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        assert acquire_in(tmp_path) < AT_ONCE


def test_a_number_used_again_is_another_process(tmp_path: Path) -> None:
    with stranger() as (_, owner):
        write_owner(tmp_path, replace(owner, started=str(int(owner.started) - 1)))
        assert acquire_in(tmp_path) < AT_ONCE


# ---------------------------------------------------------------------- on another


@contextmanager
def beats(path: Path, wait: float) -> Iterator[None]:
    """The owner's file is renewed after ``wait`` seconds, and so on."""
    done = threading.Event()

    def renew() -> None:
        while not done.wait(wait):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("wait", [period_of(SILENCE), SILENCE + 2 * period_of(SILENCE)])
@pytest.mark.parametrize(
    "where", [{"machine": "another boot"}, {"machine": module._machine(), "namespace": "another container"}]
)
def test_one_on_another_machine_is_left_alone_while_it_beats(
    tmp_path: Path, wait: float, where: dict[str, str]
) -> None:
    """However late the beat is, within its silence and four periods."""
    path = write_owner(tmp_path, elsewhere(**where))
    with beats(path, wait), pytest.raises(ConfigError, match=r"another process trains .* \(host far, "):
        FolderLock(tmp_path, SILENCE).acquire()
    assert newest(tmp_path / "owner")[0] == 1


@pytest.mark.parametrize("skew", [-3600.0, 0.0, 3600.0])
def test_one_that_does_not_is_taken_over_in_time_and_not_before(tmp_path: Path, skew: float) -> None:
    """Whatever the other's clock says."""
    path = write_owner(tmp_path, elsewhere())
    os.utime(path, (time.time() + skew, time.time() + skew))
    # Looks are half a period apart; what is above that is for a busy machine.
    assert PATIENCE <= acquire_in(tmp_path) < PATIENCE + 1.0


def test_the_longer_silence_of_the_two_counts(tmp_path: Path) -> None:
    for theirs, ours in ((0.8, 0.1), (0.1, 0.8)):
        folder = tmp_path / f"{ours}"
        folder.mkdir()
        write_owner(folder, elsewhere(silence=theirs))
        assert acquire_in(folder, ours) >= 0.8 + 4 * period_of(0.8)


def test_one_that_released_it_is_gone_at_once(tmp_path: Path) -> None:
    write_owner(tmp_path, elsewhere(released=True))
    assert acquire_in(tmp_path) < AT_ONCE


def test_an_owner_beats(tmp_path: Path) -> None:
    with held(tmp_path):
        path = tmp_path / "owner" / "00000001.json"
        before = path.stat().st_mtime_ns
        end = time.monotonic() + PATIENCE
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < end, "others would take it for dead"
            time.sleep(0.01)
    before = path.stat().st_mtime_ns
    time.sleep(3 * period_of(SILENCE))
    assert path.stat().st_mtime_ns == before, "it beats after its end"


def test_beating_tells_the_living_from_the_dead(tmp_path: Path) -> None:
    folder = tmp_path / "owner"
    assert not beating(folder), "nobody"
    with held(tmp_path):
        assert beating(folder)
    with stranger() as (process, owner):
        write_owner(tmp_path, owner, 2)
        assert beating(folder)
        process.kill()
        process.wait()
        assert not beating(folder)
    path = write_owner(tmp_path, elsewhere(), 3)
    assert beating(folder)
    os.utime(path, (time.time() - 2 * SILENCE, time.time() - 2 * SILENCE))
    assert not beating(folder)


# ---------------------------------------------------------------------- taking over


def test_a_frozen_owner_ends_when_it_wakes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with another_process(folder, machine="another boot") as (process, _, errors):
        os.kill(process.pid, signal.SIGSTOP)
        with held(folder) as lock:
            os.kill(process.pid, signal.SIGCONT)
            process.join(30)
            assert process.exitcode == 1
            assert errors.read_text().splitlines() == [
                f"error: this process was not heard of in {folder} for so long that another took it for dead and "
                "trains there now; this one ends"
            ]
            assert lock.is_ours
            number, owner = newest(folder / "owner")
            assert owner is not None
            assert (number, owner.process) == (2, os.getpid())


def test_one_that_was_taken_over_does_not_release_the_other(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, silence=600.0)  # period 2 s: it does not find out by itself during this test
    lock.acquire()
    path = write_owner(tmp_path, elsewhere(), 2)
    before = path.read_bytes()
    assert not lock.is_ours
    lock.release()
    assert path.read_bytes() == before


def test_only_the_owner_s_file_stays(tmp_path: Path) -> None:
    for _ in range(3):
        acquire_in(tmp_path)
    assert [path.name for path in (tmp_path / "owner").iterdir()] == ["00000003.json"]


def test_who_waits_while_others_come_and_go_takes_nothing_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one it waits for is taken over, its successor is done at once, and a third one trains by the next look."""
    monkeypatch.setattr(FolderLock, "_beat", lambda lock: None)  # a wrong owner would end the tests' own process
    first = write_owner(tmp_path, elsewhere())

    def others() -> None:
        time.sleep(period_of(SILENCE))
        write_owner(tmp_path, Owner.here(SILENCE), 3)  # this very process, which lives
        first.unlink()

    thread = threading.Thread(target=others)
    thread.start()
    lock = FolderLock(tmp_path, silence=SILENCE)
    try:
        with pytest.raises(ConfigError, match="another process trains"):
            lock.acquire()
    finally:
        thread.join()
    assert [path.name for path in (tmp_path / "owner").iterdir()] == ["00000003.json"]


RACERS, ROUNDS = 4, 15


def _race(folder: Path, barrier: Barrier, line: Any) -> None:
    """In each round's folder at the same moment as the others; whether this one won."""
    won = []
    for i in range(ROUNDS):
        lock = FolderLock(folder / str(i), silence=60.0)
        barrier.wait(60)
        try:
            lock.acquire()
            won.append(True)
        except ConfigError:
            won.append(False)
        barrier.wait(60)  # nobody leaves before all have tried
        if won[-1]:
            assert lock.is_ours
            lock._released.set()  # the process goes on, but not as a beating owner
    line.send(won)


@pytest.mark.parametrize("before", ["nobody", "dead", "released"])
def test_of_several_who_race_for_a_folder_one_has_it(tmp_path: Path, before: str) -> None:
    owner = replace(Owner.here(SILENCE), process=2**22 + 1, released=before == "released")  # above every pid_max
    for i in range(ROUNDS):
        (tmp_path / str(i)).mkdir()
        if before != "nobody":
            write_owner(tmp_path / str(i), owner, 7)
    context = fork_server()
    barrier = context.Barrier(RACERS)
    pipes, processes = [], []
    try:
        for _ in range(RACERS):
            here, there = context.Pipe(duplex=False)
            processes.append(context.Process(target=_race, args=(tmp_path, barrier, there)))
            processes[-1].start()
            there.close()
            pipes.append(here)
        assert all(pipe.poll(60) for pipe in pipes)
        won = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [sum(of_round) for of_round in zip(*won, strict=True)] == [1] * ROUNDS
    for i in range(ROUNDS):
        names = {path.name for path in (tmp_path / str(i) / "owner").iterdir()}
        assert names == {"00000001.json" if before == "nobody" else "00000008.json"}
