"""A stop or a save is all ranks' or none's, at the same step; signals are borrowed and given back."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain import control, launched, trainer
from pretrain.__main__ import main
from pretrain.control import SIGNALS, Request, Requests, Stop
from pretrain.distributed import World
from tests.ranks import run_ranks
from tests.runs import checkpoint_tensors, committed_steps, curve, write_config

ALONE = World(0, 1, torch.device("cpu"))
NOTHING = Request(Stop.NO, False)


@pytest.fixture(autouse=True)
def _always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_LOOK", 0.0)


@pytest.fixture
def requests(tmp_path: Path) -> Iterator[Requests]:
    before = [signal.getsignal(number) for number in SIGNALS]
    requests = Requests(ALONE, tmp_path)
    try:
        yield requests
    finally:
        requests.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before, "the signals are given back"


# ---------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", SIGNALS)
def test_alone(requests: Requests, number: signal.Signals) -> None:
    assert requests.agreed() == NOTHING
    assert not any(NOTHING), "which the loop asks"
    signal.raise_signal(number)
    assert requests.agreed() == Request(Stop.SIGNAL, False)
    assert requests.agreed() == Request(Stop.SIGNAL, False), "a request stays"


def test_a_second_interrupt_is_taken_at_its_word(requests: Requests) -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # a scheduler repeats itself
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert requests.agreed().stop is Stop.SIGNAL


def test_the_first_interrupt_is_polite(requests: Requests) -> None:
    signal.raise_signal(signal.SIGINT)
    assert requests.agreed().stop is Stop.SIGNAL
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_came_before_the_loop_is_honoured_in_it(tmp_path: Path) -> None:
    """__main__ blocks it from the first moment on; after the run it is blocked again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.raise_signal(signal.SIGUSR1)  # to this thread: others of the tests' process do not block it
        assert signal.SIGUSR1 in signal.sigpending()
        requests = Requests(ALONE, tmp_path)
        try:
            assert requests.agreed().stop is Stop.SIGNAL
            assert signal.SIGUSR1 not in signal.sigpending(), "taken, or it would end the process later"
        finally:
            requests.close()
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------- files


def test_a_stop_file_is_asked_for_until_it_is_done(requests: Requests, tmp_path: Path) -> None:
    assert requests.agreed() == NOTHING
    (tmp_path / "stop").touch()
    assert requests.agreed() == requests.agreed() == Request(Stop.FILE, False)
    requests.done(Request(Stop.FILE, False))
    assert list(tmp_path.iterdir()) == []


def test_a_save_is_asked_for_once_and_can_be_asked_for_again(requests: Requests, tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "save").touch()
        assert requests.agreed() == Request(Stop.NO, True)
        assert requests.agreed() == NOTHING, "told once until it is done"
        requests.done(Request(Stop.NO, True))
        assert list(tmp_path.iterdir()) == []
        assert requests.agreed() == NOTHING


def test_a_file_that_cannot_be_removed_does_not_save_for_ever(requests: Requests, tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()  # unlink(2) refuses a folder
    assert requests.agreed() == Request(Stop.NO, True)
    for _ in range(5):
        requests.done(Request(Stop.NO, True))
        assert requests.agreed() == NOTHING
    assert (tmp_path / "save").exists()


def test_what_is_done_for_another_reason_leaves_the_files(requests: Requests, tmp_path: Path) -> None:
    """A signal stops the run; whoever asks for a stop by a file in that moment gets it at the next start."""
    (tmp_path / "stop").touch()
    (tmp_path / "save").touch()
    requests.done(Request(Stop.SIGNAL, False))
    assert {path.name for path in tmp_path.iterdir()} == {"stop", "save"}


def test_both_at_once(requests: Requests, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    (tmp_path / "save").touch()
    assert requests.agreed() == Request(Stop.FILE, True)
    requests.done(Request(Stop.FILE, True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file_first", [False, True])
def test_a_person_s_stop_outranks_a_signal(requests: Requests, tmp_path: Path, file_first: bool) -> None:
    """A launcher starts again after a signal."""
    for is_file in (file_first, not file_first):
        if is_file:
            (tmp_path / "stop").touch()
        else:
            signal.raise_signal(signal.SIGTERM)
        requests.agreed()
    assert requests.agreed() == Request(Stop.FILE, False)


def test_a_failure_outranks_all(tmp_path: Path) -> None:
    requests = Requests(ALONE, tmp_path, failed=lambda: True)
    try:
        (tmp_path / "stop").touch()
        assert requests.agreed().stop is Stop.FAILED
    finally:
        requests.close()


def test_a_launcher_s_stop_counts_as_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, run = tmp_path / "launch", tmp_path / "run"
    launch.mkdir()
    run.mkdir()
    monkeypatch.setenv(launched.VARIABLE, str(launch))
    requests = Requests(ALONE, run)
    try:
        assert requests.agreed() == NOTHING
        (launch / "save").touch()  # means nothing there
        assert requests.agreed() == NOTHING
        (launch / "stop").write_text("SIGUSR1 on n1")
        assert requests.agreed() == Request(Stop.SIGNAL, False)
        requests.done(Request(Stop.SIGNAL, False))
        assert (launch / "stop").exists()
    finally:
        requests.close()


def test_the_folder_is_looked_at_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in each step: a shared disk answers slower than a step takes."""
    monkeypatch.setattr(control, "_LOOK", 0.3)
    requests = Requests(ALONE, tmp_path)
    try:
        assert requests.agreed() == NOTHING
        (tmp_path / "stop").touch()
        begin = time.monotonic()
        assert requests.agreed() == NOTHING
        while requests.agreed() == NOTHING:
            assert time.monotonic() - begin < 5
        assert 0.25 < time.monotonic() - begin < 2
    finally:
        requests.close()


def test_a_run_that_is_asked_by_files(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved and stopped at the very steps, gone on with, and bit for bit the one that nobody disturbed."""
    config = str(write_config(tmp_path, corpus, {"checkpoint": {"every": 0, "keep": 9}, "model": {"dropout": 0.1}}))
    struck, quiet = tmp_path / "runs/small", tmp_path / "quiet/small"
    original = trainer.train_step
    asked = {3: "save", 7: "stop", 15: "save"}  # during the step of this number, from 0

    def train_step(engine, rows, step, *rest):  # type: ignore[no-untyped-def]
        if name := asked.pop(step, None):
            (struck / name).touch()
        return original(engine, rows, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "train_step", train_step)
        assert main([config]) == 75
        assert committed_steps(struck) == [4, 8]
        assert not any((struck / name).exists() for name in ("save", "stop"))
        assert main([config]) == 0
        assert committed_steps(struck) == [4, 8, 16, 20]
        assert not any((struck / name).exists() for name in ("save", "stop"))
    assert main([config, "--runs_dir", str(quiet.parent)]) == 0
    assert curve(struck) == curve(quiet)
    here, there = (checkpoint_tensors(run / "checkpoints/step-00000020") for run in (struck, quiet))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here if isinstance(here[name], torch.Tensor))


# ---------------------------------------------------------------------- several ranks


def test_what_a_run_starts_outlives_a_signal_to_all_processes(requests: Requests) -> None:
    """Compilers, above all: a scheduler may signal every process of a step."""
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            child.send_signal(signal.SIGUSR1)
            time.sleep(0.3)
            assert child.poll() is None
        finally:
            child.kill()


def stopped_at(number: signal.Signals, struck: int, when: int) -> tuple[int, int]:
    """The step before which this rank stopped, 99 if never, and how many collectives it took part in until then.

    Rank ``struck`` gets the signal in step ``when``; ranks are slow in turn, so that none keeps pace with another.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    requests = Requests(World(rank, size, torch.device("cpu"), dist.new_group(backend="gloo")), Path("nowhere"))
    shared = torch.zeros(1)
    try:
        for step in range(20):
            if requests.agreed().stop:
                return step, int(shared.item())
            if (step + rank) % size == 0:
                time.sleep(0.003)
            if step == when and rank == struck:
                os.kill(os.getpid(), number)
            shared.fill_(1.0)
            dist.all_reduce(shared)  # the step's own collective: ranks that part here hang or raise
            assert shared.item() == size
            shared.fill_(step + 1)
        return 99, int(shared.item())
    finally:
        requests.close()


@pytest.mark.parametrize(
    ("number", "world_size", "struck", "when"),
    [(signal.SIGTERM, 2, 1, 5), (signal.SIGUSR1, 3, 2, 0), (signal.SIGINT, 3, 0, 7)],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number: signal.Signals, world_size: int, struck: int, when: int
) -> None:
    # Raised in step k, sent with k + 1's all-reduce, read before k + 2.
    assert run_ranks(stopped_at, world_size, number, struck, when) == [(when + 2, when + 2)] * world_size


def failed_at(struck: int, when: int) -> int:
    """The step before which this rank stopped after work beside rank ``struck``'s loop failed in step ``when``."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, torch.device("cpu"), dist.new_group(backend="gloo") if size > 1 else None)
    now = 0
    requests = Requests(world, Path("nowhere"), failed=lambda: rank == struck and now > when)
    try:
        while now < 20 and not requests.agreed().stop:
            now += 1
        return now
    finally:
        requests.close()


@pytest.mark.parametrize(("world_size", "struck"), [(1, 0), (3, 2)])
def test_a_failure_that_one_rank_knows_of_stops_all_at_the_same_step(world_size: int, struck: int) -> None:
    # As above; alone, nothing has to be sent first.
    assert run_ranks(failed_at, world_size, struck, 5) == [6 if world_size == 1 else 7] * world_size


def test_without_a_signal_nobody_stops() -> None:
    assert run_ranks(stopped_at, 2, signal.SIGTERM, 0, 1000) == [(99, 20)] * 2


def asked_by_files(folder: Path, save: int, stop: int) -> tuple[list[int], int, Stop]:
    """The steps before which this rank saved, the one before which it stopped, and why.

    The files are made in steps ``save`` and ``stop`` by the last rank: any process may, the first one reads them.
    """
    control._LOOK = 0.0
    rank, size = dist.get_rank(), dist.get_world_size()
    requests = Requests(World(rank, size, torch.device("cpu"), dist.new_group(backend="gloo")), folder)
    saved = []
    try:
        for step in range(30):
            request = requests.agreed()
            if request.save:
                saved.append(step)
            dist.barrier()  # as a checkpoint is: ranks that part here hang
            requests.done(request)
            if request.stop:
                return saved, step, request.stop
            if rank == size - 1:
                for name, when in (("save", save), ("save", save + 6), ("stop", stop)):
                    if step == when:
                        (folder / name).touch()
            dist.barrier()
        return saved, 99, Stop.NO
    finally:
        requests.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_files_are_obeyed_by_all_ranks_at_the_same_step(tmp_path: Path, world_size: int) -> None:
    # Made in step k, sent with k + 1's all-reduce, read before k + 2.
    assert run_ranks(asked_by_files, world_size, tmp_path, 4, 20) == [([6, 12], 22, Stop.FILE)] * world_size
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_stays_is_obeyed_once_by_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()  # unlink(2) refuses a folder
    assert run_ranks(asked_by_files, 2, tmp_path, 99, 20) == [([1], 22, Stop.FILE)] * 2
