"""Throughput on the CPU next to what torch offers: run with ``make bench``.

Every benchmark times ours with pytest-benchmark and, in the setup before each round, the peer: both
sides alternate in one process, and machine drift hits both. ``extra_info`` keeps the peer's
median, the ratio of the medians (above 1: we are faster), the bytes that had to move and the GB/s
that they make: a read of the table's kind moves the parameter only, 4 or 2 bytes an element.
``_foreach_add_`` moves 8 more, to read and write its sum.

- ``read``: all parameters once into a table of 2^18 buckets. ``plain`` is ``torch.sum`` of one
  vector of as many bytes, a single stream of reads for each thread.
- ``close``: the tables at a window's end, next to a close of float32 sums.
- ``window``: 64 steps and the close through the public API, the parameters having moved. The
  128,000 elements of ``tiny2000`` have their own buckets there, so that its angles are exact.
- ``snapshots``: the same with 16 reads in 64 steps, next to 64 sums.

``ISA=avx2 make bench`` uses that instruction set in place of the best one of the processor.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peers import Flattening, Foreach, ForeachStaged, PlainRead, against_float64
from shapes import SHAPES, tensors

from autodrop_ext import AngularVelocity, ops
from autodrop_ext.ops import select
from autodrop_ext.ops.backends import CpuBackend
from autodrop_ext.ops.plan import Plan, Source

CPU = torch.device("cpu")
ROUNDS, WINDOWS, WINDOW, SNAPSHOTS, BUCKETS = 15, 5, 64, 16, 2**18
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = {"foreach": Foreach, "staged": ForeachStaged, "flattening": Flattening, "plain": PlainRead}


def cases(peers: dict[str, tuple[str, ...]]) -> Any:
    """Every model with these peers by dtype, the parameters of a test."""
    return pytest.mark.parametrize(
        ("model", "dtype", "peer"),
        [
            pytest.param(model, DTYPES[dtype], PEERS[peer], id=f"{model}-{dtype}-{peer}")
            for model in SHAPES
            for dtype, names in peers.items()
            for peer in names
        ],
    )


@pytest.fixture(autouse=True)
def _two_threads_and_instruction_set() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    usual, ops.BACKENDS["cpu"] = ops.BACKENDS["cpu"], CpuBackend(os.environ.get("ISA", ""))
    yield
    ops.BACKENDS["cpu"] = usual
    torch.set_num_threads(threads)


def compare(
    benchmark: Any,
    ours: Callable[[], object],
    peer: Callable[[], object],
    moved: int,
    rounds: int = ROUNDS,
) -> None:
    """Time ours and the peer in turns; ``moved`` are the bytes that ours has to move."""
    times = []

    def before_each_round() -> None:
        start = time.perf_counter()
        peer()
        times.append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=before_each_round, rounds=rounds, warmup_rounds=1)
    theirs = statistics.median(times[-rounds:])
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "peer_median_s": theirs,
        "ratio": theirs / median,
        "bytes_moved": moved,
        "gb_per_s": moved / median / 1e9,
    }


def size(params: list[torch.Tensor]) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in params)


@cases({"float32": ("foreach", "flattening", "plain"), "bfloat16": ("foreach", "staged", "plain")})
@pytest.mark.benchmark(group="read")
def test_read(benchmark: Any, model: str, dtype: torch.dtype, peer: Any) -> None:
    params = tensors(model, dtype)
    sources = [Source(f"{i}", lambda p=p: p, p.numel(), dtype) for i, p in enumerate(params)]  # type: ignore[misc]
    plan = Plan(sources, CPU, buckets=BUCKETS)
    read, table = select("cpu", CPU).bind(plan), torch.zeros(BUCKETS, dtype=torch.float64)
    bases = np.array([p.data_ptr() for p in params])
    compare(benchmark, lambda: read.accumulate(table, bases), peer(params).accumulate, size(params))
    assert float(table.abs().sum()) > 0


@cases({"float32": ("foreach",)})
@pytest.mark.benchmark(group="close")
def test_close(benchmark: Any, model: str, dtype: torch.dtype, peer: Any) -> None:
    """Ours is the same for every model: three tables are read and written."""
    other = peer(tensors(model, dtype))
    for sums in (other.running, other.previous, other.before):
        for t in sums:
            t.normal_()
    tables = [torch.randn(BUCKETS, dtype=torch.float64) for _ in range(3)]
    bounds, backend = np.array([0, BUCKETS]), select("cpu", CPU)
    compare(
        benchmark,
        lambda: backend.close(*tables, WINDOW, bounds),
        lambda: other.close(WINDOW),
        6 * 8 * BUCKETS,
    )


def compare_windows(
    benchmark: Any, model: str, dtype: torch.dtype, peer: Any, snapshots: int
) -> None:
    params = tensors(model, dtype)
    meter = AngularVelocity(params, WINDOW, snapshots=snapshots, backend="cpu")
    other = peer(params)

    def ours() -> None:
        for _ in range(WINDOW):
            meter.observe()

    def theirs() -> None:
        torch._foreach_mul_(params, 1.1)  # bfloat16 ones that hardly move would earn a warning
        for step in range(WINDOW):
            other.accumulate(first=step == 0)
        other.close(WINDOW)

    moved = snapshots * size(params) + 6 * 8 * BUCKETS
    compare(benchmark, ours, theirs, moved, WINDOWS)


@cases({"float32": ("foreach",), "bfloat16": ("foreach", "staged")})
@pytest.mark.benchmark(group="window")
def test_whole_window(benchmark: Any, model: str, dtype: torch.dtype, peer: Any) -> None:
    compare_windows(benchmark, model, dtype, peer, WINDOW)


@cases({"float32": ("foreach",), "bfloat16": ("foreach", "staged")})
@pytest.mark.benchmark(group="snapshots")
def test_window_of_few_snapshots(benchmark: Any, model: str, dtype: torch.dtype, peer: Any) -> None:
    compare_windows(benchmark, model, dtype, peer, SNAPSHOTS)


@pytest.mark.parametrize("peer", [Foreach, ForeachStaged, Flattening])
def test_peers_are_right(benchmark: Any, peer: Any) -> None:
    """What is timed above gives the numbers of float64, as precisely as it claims to."""
    result, wanted = benchmark.pedantic(against_float64, args=(peer,), rounds=1)
    assert result == pytest.approx(wanted, rel=peer.accuracy)
