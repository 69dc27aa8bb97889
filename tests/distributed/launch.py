"""Run a function on several ranks with gloo, on this machine.

Processes are forked from a server that has imported torch, so that a run takes a fraction of a
second instead of seconds.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pathlib
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch._dynamo",  # imported late by DDP, FSDP and optimizers, for two seconds
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.distributed.optim",
        "torch.distributed.checkpoint.state_dict",
        "pytest",
        "autodrop_ext",
    ]
)

TIMEOUT = 20  # seconds in which a process group gives up; the runs themselves take one or two


class RankFailedError(Exception):
    """A rank raised, or died without a word."""


class NotConnectedError(Exception):
    """gloo did not connect the ranks, before anything of this package ran."""


def run(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    may_die: tuple[int, ...] = (),
) -> list[Any]:
    """Results of ``function(rank, *args)`` on ``world`` ranks, in rank order.

    Args:
        world: number of processes, each with the default process group on gloo.
        function: of a module, so that it can be pickled; so must be its arguments and results.
        timeout: of the process group, seconds.
        may_die: ranks that may end without a result; theirs is None.

    Raises:
        RankFailedError: with the traceback of the first rank that raised.
    """
    try:
        return start_ranks(world, function, args, timeout, may_die)
    except NotConnectedError as error:
        # On a busy machine gloo sometimes loses a connection while ranks are still meeting.
        print(f"{error}\nThe ranks are started again.")
        return start_ranks(world, function, args, timeout, may_die)


def start_ranks(
    world: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
    may_die: tuple[int, ...],
) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        store = pathlib.Path(folder) / "store"
        workers = []
        for rank in range(world):
            ours, theirs = _SERVER.Pipe(duplex=False)
            worker = _SERVER.Process(
                target=_work, args=(theirs, str(store), rank, world, timeout, function, args)
            )
            worker.start()
            theirs.close()
            workers.append((worker, ours))
        try:
            return _collect(workers, may_die)
        finally:
            for worker, _ in workers:
                worker.kill()
                worker.join()


def _collect(workers: list[tuple[Any, Connection]], may_die: tuple[int, ...]) -> list[Any]:
    results: dict[int, Any] = {}
    pending = {connection: rank for rank, (_, connection) in enumerate(workers)}
    while pending:
        for connection in wait(list(pending), timeout=120) or [None]:
            if connection is None:
                raise RankFailedError(f"ranks {sorted(pending.values())} did not end in 120 s")
            rank = pending.pop(connection)
            try:
                fine, result = connection.recv()
            except EOFError:
                if rank not in may_die:
                    raise RankFailedError(f"rank {rank} died without a word") from None
                fine, result = True, None
            if fine is None:
                raise NotConnectedError(f"rank {rank}: {result}")
            if not fine:
                raise RankFailedError(f"rank {rank}: {result}")
            results[rank] = result
    return [results[rank] for rank in range(len(workers))]


def _work(
    results: Connection,
    store: str,
    rank: int,
    world: int,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the engines; functions catch what they test
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # looked for, not used
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
    except RuntimeError:
        results.send((None, traceback.format_exc()))
        raise
    try:
        results.send((True, function(rank, *args)))
    except BaseException:
        results.send((False, traceback.format_exc()))
    finally:
        results.close()
        # Not destroy_process_group: it would wait for ranks that are dead.
        os._exit(0)
