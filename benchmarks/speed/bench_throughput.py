"""Throughput on the CPU next to what torch offers: run with ``make bench``.

Every benchmark times ours with pytest-benchmark and, in the setup before each round, the peer: both
sides alternate in one process, and machine drift hits both. ``extra_info`` keeps the peer's
median, the ratio of the medians (above 1: we are faster), the bytes that had to move and the GB/s
that they make.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autodrop_ext.ops.device_sums import DeviceSums
from peers import Flattening, Foreach, ForeachFloat32, against_float64
from shapes import tensors

from autodrop_ext import AngularVelocity
from autodrop_ext.ops import select
from autodrop_ext.ops.plan import Plan

ROUNDS, WINDOW = 15, 64
MODELS = [
    ("resnet50", torch.float32),
    ("resnet50", torch.bfloat16),
    ("transformer60m", torch.float32),
    ("transformer60m", torch.bfloat16),
    ("tiny2000", torch.float32),
    ("tiny2000", torch.bfloat16),
]
every_model = pytest.mark.parametrize(
    ("model", "dtype"), MODELS, ids=[f"{m}-{str(d).split('.')[1]}" for m, d in MODELS]
)
every_peer = pytest.mark.parametrize("peer", [Foreach, Flattening], ids=["foreach", "flattening"])


@pytest.fixture(autouse=True)
def _two_threads() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def compare(
    benchmark: Any, ours: Callable[[], object], peer: Callable[[], object], moved: int
) -> None:
    """Time ours and the peer in turns; ``moved`` are the bytes that ours has to move."""
    times = []

    def before_each_round() -> None:
        start = time.perf_counter()
        peer()
        times.append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=before_each_round, rounds=ROUNDS, warmup_rounds=2)
    theirs = statistics.median(times[-ROUNDS:])
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "peer_median_s": theirs,
        "ratio": theirs / median,
        "bytes_moved": moved,
        "gb_per_s": moved / median / 1e9,
    }


def device_sums_of(params: list[torch.Tensor]) -> DeviceSums:
    cpu = torch.device("cpu")
    return DeviceSums(Plan([(f"p{i}", p) for i, p in enumerate(params)], cpu), select("cpu", "cpu"))


def bytes_of(params: list[torch.Tensor]) -> tuple[int, int]:
    """Elements, and bytes of the parameters themselves."""
    return sum(p.numel() for p in params), sum(p.numel() * p.element_size() for p in params)


@every_peer
@every_model
@pytest.mark.benchmark(group="accumulate")
def test_accumulate(benchmark: Any, model: str, dtype: torch.dtype, peer: Any) -> None:
    params = tensors(model, dtype)
    arenas, other = device_sums_of(params), peer(params)
    arenas.begin("sum")
    n, own = bytes_of(params)
    compare(benchmark, lambda: arenas.add(first=False), other.accumulate, own + 8 * n)


@pytest.mark.parametrize("peer", [Foreach, ForeachFloat32], ids=["foreach", "foreach32"])
@every_model
@pytest.mark.benchmark(group="close")
def test_close(benchmark: Any, model: str, dtype: torch.dtype, peer: Any) -> None:
    params = tensors(model, dtype)
    arenas, other = device_sums_of(params), peer(params)
    for part in (arenas.running, arenas.previous, arenas.before):
        part.normal_()
    for sums in (other.running, other.previous, other.before):
        for t in sums:
            t.normal_()
    n, _ = bytes_of(params)
    compare(benchmark, lambda: arenas.close(WINDOW), lambda: other.close(WINDOW), 12 * n)


@every_peer
@every_model
@pytest.mark.benchmark(group="window")
def test_whole_window(benchmark: Any, model: str, dtype: torch.dtype, peer: Any) -> None:
    """64 steps and the close, ours through the public API."""
    if peer is Flattening and model == "transformer60m":
        pytest.skip("64 flattenings of 60 million parameters a round take minutes")
    params = tensors(model, dtype)
    # Held in sum form: parameters that stand still would ask for delta form.
    meter, other = AngularVelocity(params, WINDOW, form="sum"), peer(params)

    def ours() -> None:
        for _ in range(WINDOW):
            meter.observe()

    def theirs() -> None:
        torch._foreach_mul_(params, 1.01)  # parameters that stand still would earn a warning
        for step in range(WINDOW):
            other.accumulate(first=step == 0)
        other.close(WINDOW)

    n, own = bytes_of(params)
    moved = (own + 4 * n) + (WINDOW - 1) * (own + 8 * n) + 12 * n
    compare(benchmark, ours, theirs, moved)


@pytest.mark.parametrize("peer", [Foreach, ForeachFloat32, Flattening])
def test_peers_are_right(benchmark: Any, peer: Any) -> None:
    """What is timed above gives the numbers of float64, as precisely as it claims to."""
    result, wanted = benchmark.pedantic(against_float64, args=(peer,), rounds=1)
    assert result == pytest.approx(wanted, rel=peer.accuracy)
