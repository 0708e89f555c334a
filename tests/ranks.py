"""Several gloo ranks inside a test: ``run_ranks(function, 4, argument, ...)``.

Ranks are forked from a server process that has imported torch and started no thread. That starts a rank in a tenth of
a second (spawn: six seconds) and inherits nothing of the test's own threads (fork of the test: deadlocks in OpenMP).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = ["pytest", "hypothesis", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "deepspeed"]
_PRELOAD += [__name__]
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
_GRACE = 10.0  # seconds for the other ranks to say what they saw once one has failed


def fork_server() -> ForkServerContext:
    """Starts clean processes in which torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


class RankError(AssertionError):
    """A rank failed or did not finish; ``outcomes`` has a line or traceback for each rank."""

    def __init__(self, outcomes: list[str]) -> None:
        super().__init__("".join(f"\n--- rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes)))
        self.outcomes = outcomes


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """``function(*args)`` on ``world_size`` gloo ranks of one thread each; its results by rank.

    ``function`` is a module's own (it is pickled by name), its arguments and results are picklable. Raises RankError
    with every rank's traceback if one raises, dies or is not done after ``timeout`` seconds; no process outlives the
    call.
    """
    # Pickled here and not by multiprocessing, whose tensors are handles to memory of a process that may be gone.
    call = pickle.dumps((function, args))
    context = fork_server()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        try:
            for rank in range(world_size):
                here, there = context.Pipe(duplex=False)
                rest = (store, rank, world_size, timeout, call)
                processes.append(context.Process(target=_rank, args=(there, *rest), daemon=True))
                processes[-1].start()
                there.close()  # the rank holds the only writing end now, so its death ends the pipe
                pipes.append(here)
            outcomes = _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if all(done for done, _ in outcomes):
            return [result for _, result in outcomes]
        raise RankError([str(result) if not done else "finished" for done, result in outcomes])


def _collect(pipes: list[Connection], deadline: float) -> list[tuple[bool, Any]]:
    """For each rank whether it finished, and its result or what is known of its failure."""
    outcomes: list[tuple[bool, Any]] = [(False, "did not finish in time")] * len(pipes)
    pending = dict(zip(pipes, range(len(pipes)), strict=True))
    while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending.pop(pipe)
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcomes[rank] = (False, "died without a word")
            if not outcomes[rank][0]:
                deadline = min(deadline, time.monotonic() + _GRACE)
    return outcomes


def _rank(pipe: Connection, store: str, rank: int, world_size: int, timeout: float, call: bytes) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        function, args = pickle.loads(call)
        pipe.send_bytes(pickle.dumps((True, function(*args))))
        dist.barrier()  # a rank that leaves early takes its sockets with it
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
