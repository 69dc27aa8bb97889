"""Plans: every element once, in the bucket that the specification gives it."""

from __future__ import annotations

import numpy as np
import pytest
import table_model as model
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodrop_ext.ops.backends import CpuBackend, close_blocks
from autodrop_ext.ops.plan import (
    DTYPES,
    LANES,
    PIECE,
    SPAN,
    SPAN_ELEMENTS,
    SWAPS,
    Plan,
    Runs,
    Source,
    key_of,
    place,
)

CPU = torch.device("cpu")


def source(
    numel: int, dtype: torch.dtype = torch.float32, *, name: str = "t", **options: object
) -> Source:
    """A tensor that no plan may look at while it is made."""

    def current() -> torch.Tensor:
        raise AssertionError("a plan needs no tensor")

    return Source(name, current, numel, dtype, **options)  # type: ignore[arg-type]


def runs_of(*runs: tuple[int, int, int]) -> Runs:
    return Runs(*np.array(runs, np.int64).reshape(-1, 3).T)


def elements(plan: Plan, of: int) -> np.ndarray:
    """Local elements of a tensor that the plan reads, in the order of their places there."""
    rows = plan.table[plan.table["tensor"] == of]
    size = plan.sources[of].dtype.itemsize
    first = rows["offset"] // size
    parts = [np.arange(a, a + n) for a, n in zip(first, rows["length"].astype(int), strict=True)]
    return np.sort(np.concatenate([np.zeros(0, int), *parts]))


sizes = st.lists(st.tuples(st.integers(0, 3 * LANES), st.integers(0, 3)), max_size=12)


@given(sizes, st.sampled_from([1, 2, 16]), st.booleans())
def test_every_element_is_read_once(shapes: list[tuple[int, int]], rows: int, exact: bool) -> None:
    sources = [source(n, DTYPES[d], name=f"t{i}") for i, (n, d) in enumerate(shapes)]
    plan = Plan(sources, CPU, buckets=None if exact else rows * LANES)
    for i, (n, d) in enumerate(shapes):
        assert elements(plan, i).tolist() == list(range(n))
        assert (plan.table["dtype"][plan.table["tensor"] == i] == d).all()
    assert plan.num_rows == (0 if exact else rows)
    assert not plan.weighted


@settings(deadline=None)  # the model goes piece by piece
@given(sizes, st.sampled_from([1, 3, 64]), st.integers(1, 3))
def test_pieces_are_those_of_the_model(
    shapes: list[tuple[int, int]], rows: int, groups: int
) -> None:
    sources, tensors = [], []
    for i, (n, d) in enumerate(shapes):
        weight, group = 1 / (1 + i % 2), i % groups
        sources.append(source(n, DTYPES[d], name=f"t{i}", weight=weight, group=group))
        empty = np.zeros(0, np.uint8)
        tensors.append(model.Tensor(empty, 0, d, n, 0, weight, group, key_of(f"t{i}")))
    plan = Plan(sources, CPU, buckets=rows * LANES, num_tables=groups)
    pieces, runs = model.pieces_of(tensors, rows, groups)
    assert plan.table.dtype == PIECE == model.PIECE
    assert plan.table.tolist() == pieces.tolist()
    assert plan.runs.tolist() == runs.tolist()
    assert plan.num_buckets == rows * groups * LANES
    assert plan.weighted == (len(shapes) > 1)


@given(st.integers(1, 4 * LANES), st.lists(st.integers(0, 4 * LANES), max_size=5))
def test_pieces_of_shards_are_parts_of_those_of_the_whole(n: int, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    buckets = 16 * LANES
    whole = Plan([source(n)], CPU, buckets=buckets)
    of_chunk = {
        int(p["offset"]) // 4 // LANES: tuple(p[["hash", "packet", "swap"]].item())
        for p in whole.table
    }
    for begin, end in zip(edges, edges[1:], strict=False):
        runs = runs_of((0, begin, end - begin))
        shard = Plan([source(end - begin, runs=runs)], CPU, buckets=buckets)
        assert elements(shard, 0).tolist() == list(range(end - begin))
        for piece in shard.table:
            index = begin + int(piece["offset"]) // 4
            chunk, start = divmod(index, LANES)
            assert int(piece["start"]) == start
            assert start + int(piece["length"]) <= LANES
            assert tuple(piece[["hash", "packet", "swap"]].item()) == of_chunk[chunk]


def test_a_shard_of_many_runs() -> None:
    """Columns 3 to 5 of 2,000 rows of 10: stretches of two elements, some cut by a chunk's end."""
    runs = Runs(
        np.arange(2000) * 2, np.arange(2000, dtype=np.int64) * 10 + 3, np.full(2000, 2, np.int64)
    )
    for buckets in (4 * LANES, None):
        plan = Plan([source(4000, runs=runs)], CPU, buckets=buckets, num_buckets=20_000)
        assert elements(plan, 0).tolist() == list(range(4000))
    first = plan.table["bucket"]
    assert set(first % 10) <= {3, 4} and plan.table["length"].sum() == 4000


@given(sizes)
def test_spans_are_sorted_and_never_overlap(shapes: list[tuple[int, int]]) -> None:
    firsts = np.cumsum([0, *(n for n, _ in shapes)])
    order = np.random.default_rng(len(shapes)).permutation(len(shapes))
    sources = [source(shapes[i][0], DTYPES[shapes[i][1]], bucket=int(firsts[i])) for i in order]
    plan = Plan(sources, CPU, buckets=None, num_buckets=int(firsts[-1]))
    begin = plan.table["bucket"]
    end = begin + plan.table["length"]
    assert plan.table.dtype == SPAN == model.SPAN
    assert (plan.table["length"] <= SPAN_ELEMENTS).all()
    assert (end[:-1] == begin[1:]).all()  # in this order without gaps: one bucket an element
    assert (plan.table["length"].sum(), plan.num_buckets) == (firsts[-1], firsts[-1])


def test_a_weight_makes_a_plan_weighted() -> None:
    for buckets in (LANES, None):
        assert not Plan([source(3)], CPU, buckets=buckets).weighted
        plan = Plan([source(3), source(3, weight=0.5)], CPU, buckets=buckets, num_buckets=6)
        assert plan.weighted
        assert sorted(plan.table["weight"]) == [0.5, 1.0]


def test_a_plan_of_nothing() -> None:
    hashed = Plan([], CPU, buckets=2 * LANES)
    assert len(hashed.table) == 0 and hashed.runs.tolist() == [0] * (2 * SWAPS + 1)
    exact = Plan([source(0)], CPU, buckets=None)
    assert len(exact.table) == 0 and exact.num_buckets == 0


def test_chunks_spread_over_rows_lanes_and_signs() -> None:
    n, rows = 200_000, 64
    keys = np.full(n, key_of("layers.0.weight"), np.uint64)
    of = place(keys, np.arange(n), rows)
    # Counts of random choices scatter by the root of their mean; five of these.
    for values, kinds in ((of.row, rows), (of.packet, LANES // SWAPS), (of.swap, SWAPS)):
        counts = np.bincount(values, minlength=kinds)
        assert np.abs(counts - n / kinds).max() < 5 * (n / kinds) ** 0.5
    bits = np.unpackbits(of.hash.view(np.uint8)).reshape(n, 32).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / n**0.5
    # Neighbours, and the same chunk of another parameter, have nothing in common.
    other = place(np.full(n, key_of("layers.1.weight"), np.uint64), np.arange(n), rows)
    for a, b in ((of.row[1:], of.row[:-1]), (of.row, other.row)):
        assert np.mean(a == b) == pytest.approx(1 / rows, abs=5 * (1 / rows / n) ** 0.5)


def test_the_hash_of_a_name_is_the_same_everywhere() -> None:
    """Checkpoints hold tables: these numbers are for ever."""
    assert key_of("layers.0.weight") == 0x3E163D53ECC2C30C
    of = place(np.array([key_of("w")], np.uint64), np.array([7]), 64)
    assert [int(value[0]) for value in of] == [46, 325, 4, 2163499734]


def ends_of(n: int) -> Runs:
    """The first and the last 5,000 elements."""
    return runs_of((0, 0, 5000), (n - 5000, n - 5000, 5000))


def test_tables_beyond_2_to_the_31_elements() -> None:
    lengths = [2**31 + 7, 2**33]
    sources = [
        source(n, dtype, name=name, bucket=first, runs=ends_of(n))
        for n, dtype, name, first in zip(
            lengths, (torch.bfloat16, torch.float32), "ab", (5, 5 + 2**31 + 7), strict=True
        )
    ]
    for buckets in (64 * LANES, None):
        plan = Plan(sources, CPU, buckets=buckets, num_buckets=5 + sum(lengths))
        for i, n in enumerate(lengths):
            assert elements(plan, i)[[0, 4999, 5000, -1]].tolist() == [0, 4999, n - 5000, n - 1]
    last = plan.table[-1]
    assert int(last["bucket"]) + int(last["length"]) == 5 + 2**31 + 7 + 2**33


@given(st.lists(st.integers(0, 3 * LANES), min_size=1, max_size=20))
def test_blocks_of_a_close_cover_every_part(lengths: list[int]) -> None:
    bounds = np.cumsum([0, *lengths])
    blocks, part = close_blocks(bounds)
    assert blocks.dtype == np.int64
    assert (blocks[:, 1] - blocks[:, 0] > 0).all()
    assert (blocks[:, 1] - blocks[:, 0] <= LANES).all()
    for i, n in enumerate(lengths):
        mine = blocks[part == i]
        assert (mine[:, 1] - mine[:, 0]).sum() == n
        if n:
            assert (mine[0, 0], mine[-1, 1]) == (bounds[i], bounds[i + 1])
            assert (mine[1:, 0] == mine[:-1, 1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_more_than_2_to_the_31_elements_for_real(exact: bool) -> None:
    """One bf16 tensor of 2^31 + 100 elements, 4 GiB; of the exact table only both ends are used."""
    n = 2**31 + 100
    x = torch.from_numpy(np.zeros(n, np.int16)).view(torch.bfloat16)
    marked = {0: 1.0, 2**31 - 1: 2.0, 2**31: 3.0, n - 1: 4.0}
    for i, value in marked.items():
        x[i] = value
    runs = ends_of(n) if exact else None
    big = Source("x", lambda: x, n, x.dtype, runs=runs)
    plan = Plan([big], CPU, buckets=None if exact else 64 * LANES, num_buckets=n)
    table = torch.from_numpy(np.zeros(plan.num_buckets))  # memory that nobody writes to is not used
    read = CpuBackend().bind(plan)
    for _ in range(2):
        read.accumulate(table, np.array([x.data_ptr()], np.int64))
    if exact:
        assert {i: table[i].item() / 2 for i in marked} == marked
        assert [int(table[a:b].count_nonzero()) for a, b in ((0, 5000), (n - 5000, n))] == [1, 3]
    else:
        # Every one has its own bucket: two neighbours at most share a chunk.
        assert sorted(table[table != 0].abs().tolist()) == [2.0, 4.0, 6.0, 8.0]
