"""The operations of every backend, on every case, against the reference and float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from cases import BACKENDS, every_backend, every_case, make
from torch import Tensor

from autodrop_ext.memory import is_dense
from autodrop_ext.ops.backends import Accumulation
from autodrop_ext.ops.plan import LANES, Plan, Runs, Source
from autodrop_ext.sharding import as_real

CPU = torch.device("cpu")
BUCKETS = 4 * LANES


def numel(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def plan_of(tensors: list[Tensor], *, exact: bool, weights: list[float] | None = None) -> Plan:
    sizes = [numel(t) for t in tensors]
    firsts = np.cumsum([0, *sizes]).tolist()
    sources = [
        Source(
            f"t{i}",
            functools.partial(as_real, tensor),
            sizes[i],
            as_real(tensor).dtype,
            weight=1.0 if weights is None else weights[i],
            bucket=firsts[i],
            staged=not is_dense(as_real(tensor)),
        )
        for i, tensor in enumerate(tensors)
    ]
    return Plan(sources, CPU, buckets=None if exact else BUCKETS, num_buckets=firsts[-1])


def add(plan: Plan, read: Accumulation, table: Tensor) -> None:
    """A read as the sketch makes it: addresses of now, dense copies of what is not."""
    now = [s.current().contiguous() if s.staged else s.current() for s in plan.sources]
    read.accumulate(table, np.array([t.data_ptr() for t in now], np.int64))


def accumulated(plan: Plan, backend: str) -> Tensor:
    table = torch.linspace(0, 1, plan.num_buckets, dtype=torch.float64)
    add(plan, BACKENDS[backend].bind(plan), table)
    return table


@every_case
@every_backend
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_tables_are_those_of_the_reference(
    case: str, backend: str, exact: bool, weighted: bool
) -> None:
    tensors = make(case)
    weights = [1 / (i % 3 + 1) for i in range(len(tensors))] if weighted else None
    plan = plan_of(tensors, exact=exact, weights=weights)
    got, expected = accumulated(plan, backend), accumulated(plan, "reference")
    largest = max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=1.0)
    # Up to a few hundred float64 additions a bucket, each rounded to 2^-53 of the largest sum.
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12 * max(1.0, largest))


@every_backend
@pytest.mark.parametrize("exact", [False, True])
def test_the_same_inputs_give_the_same_bits(backend: str, exact: bool) -> None:
    plan = plan_of(make("threads"), exact=exact)
    threads = torch.get_num_threads()
    tables = []
    for count in (1, threads, 3):
        torch.set_num_threads(count)
        tables.append(accumulated(plan, backend))
    torch.set_num_threads(threads)
    assert all(torch.equal(tables[0], table) for table in tables[1:])


@every_backend
@pytest.mark.parametrize("exact", [False, True])
def test_shards_add_up_to_the_whole(backend: str, exact: bool) -> None:
    whole = torch.randn(5 * LANES + 77, generator=torch.Generator().manual_seed(1))
    plan = plan_of([whole], exact=exact)
    parts = []
    for begin, end in ((0, 333), (333, 333), (333, 9_001), (9_001, whole.numel())):
        runs = Runs(*(np.array([value]) for value in (0, begin, end - begin)))
        here = whole[begin:end].clone()
        shard = Source("t0", lambda here=here: here, len(here), here.dtype, runs=runs)
        buckets = None if exact else BUCKETS
        parts.append(Plan([shard], CPU, buckets=buckets, num_buckets=whole.numel()))
    total = torch.zeros(plan.num_buckets, dtype=torch.float64)
    for part in parts:
        add(part, BACKENDS[backend].bind(part), total)
    expected = torch.zeros_like(total)
    add(plan, BACKENDS[backend].bind(plan), expected)
    # Six elements a bucket, in another order: a few units of 2^-53.
    assert torch.allclose(total, expected, rtol=0, atol=1e-14)


@every_backend
@pytest.mark.parametrize("exact", [False, True])
def test_dot_products_are_those_of_float64(backend: str, exact: bool) -> None:
    g = torch.Generator().manual_seed(2)
    x = [torch.randn(n, generator=g) for n in (40_000, 3, 9_000)]
    plan = plan_of(x, exact=exact)
    bounds = np.array([0, plan.num_buckets], np.int64)
    tables = [torch.zeros(plan.num_buckets, dtype=torch.float64) for _ in range(3)]
    read, means, sums = BACKENDS[backend].bind(plan), [], []
    for _ in range(3):
        mean = torch.zeros(49_003, dtype=torch.float64)
        for _ in range(4):
            for tensor in x:
                tensor.add_(torch.randn(tensor.shape, generator=g), alpha=1e-3)
            add(plan, read, tables[0])
            mean += torch.cat([t.double() for t in x]) / 4
        means.append(mean)
        sums.append(BACKENDS[backend].close(*tables, 4.0, bounds)[0])
    s, before = means[2] - means[1], means[1] - means[0]
    assert not tables[0].any()
    dot, norm, previous = float(s @ before), float(s @ s), float(before @ before)
    if exact:
        # Sums of 49,003 products, rounded to 2^-53 each.
        assert sums[2].tolist() == pytest.approx([dot, norm], rel=1e-11)
    else:
        # The sketch's error: sqrt(2 / buckets) of the norms, 1.1 %, three times that.
        scale = (norm * previous) ** 0.5
        assert sums[2][0] == pytest.approx(dot, abs=0.033 * scale)
        assert sums[2][1] == pytest.approx(norm, rel=0.033)


@every_backend
def test_parts_are_closed_one_by_one(backend: str) -> None:
    g = torch.Generator().manual_seed(3)
    bounds = np.array([0, 1, 1, 5_000, 12_000], np.int64)
    tables = [torch.randn(12_000, generator=g, dtype=torch.float64) for _ in range(3)]
    expected = BACKENDS["reference"].close(*(t.clone() for t in tables), 3.0, bounds)
    mine = [t.clone() for t in tables]
    sums = BACKENDS[backend].close(*mine, 3.0, bounds)
    # Sums of 7,000 products in another order.
    assert sums == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert torch.equal(mine[1], tables[0] / 3.0)
    assert torch.equal(mine[2], tables[0] / 3.0 - tables[1])


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_not_finite_shows(backend: str, bad: float, exact: bool) -> None:
    x = torch.zeros(9_000)
    x[4_321] = bad
    table = accumulated(plan_of([x], exact=exact), backend)
    assert int((~table.isfinite()).sum()) == 1
