"""Tables and views: every element once, whatever the tensors look like."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from autodrop_ext.ops.cpu import CpuBackend
from cases import every_case, make
from hypothesis import given
from hypothesis import strategies as st

from autodrop_ext.ops import reference
from autodrop_ext.ops.plan import (
    ALIGN_ELEMENTS,
    CHUNK_ELEMENTS,
    Plan,
    chunk_tables,
    is_dense,
    tile_table,
)

CPU = torch.device("cpu")


def plan_of(*tensors: torch.Tensor) -> Plan:
    return Plan([(f"t{i}", t) for i, t in enumerate(tensors)], CPU)


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3)), max_size=40),
    st.sampled_from([32, 64, 1024]),
)
def test_chunks_cover_every_element_once(shapes: list[tuple[int, int]], size: int) -> None:
    lengths = [n for n, _ in shapes]
    dtypes = [d for _, d in shapes]
    addresses = [10_000_000 * (i + 1) for i in range(len(shapes))]
    tables = chunk_tables(addresses, lengths, dtypes, size)
    assert tables.arena_elements % ALIGN_ELEMENTS == 0
    arena_end = 0
    for t, (n, d) in enumerate(shapes):
        rows = tables.chunks[tables.tensor_chunks[t] : tables.tensor_chunks[t + 1]]
        assert rows[:, 2].sum() == n
        assert (rows[:, 2] > 0).all() and (rows[:, 2] <= size).all()
        starts = np.cumsum(rows[:, 2]) - rows[:, 2]
        assert (rows[:, 0] == addresses[t] + starts * reference.DTYPES[d].itemsize).all()
        assert (rows[:, 1] == tables.offsets[t] + starts).all()
        assert (rows[:, 3] == d).all()
        assert tables.offsets[t] % ALIGN_ELEMENTS == 0 and tables.offsets[t] >= arena_end
        arena_end = tables.offsets[t] + n
    assert tables.tensor_chunks[-1] == len(tables.chunks)


@given(st.lists(st.sampled_from([1, 64, 1024, 1025, 8192]), max_size=120))
def test_tiles_hold_every_chunk_once(lengths: list[int]) -> None:
    tiles = tile_table(np.array(lengths, np.int64))
    held = [list(range(first, first + count)) for first, count in tiles]
    assert [c for tile in held for c in tile] == list(range(len(lengths)))
    for tile in held:
        assert len(tile) == 1 or all(lengths[c] <= 1024 for c in tile)
        assert len(tile) <= 16
    # Small neighbours are not scattered over more tiles than they need.
    runs = [list(g) for small, g in itertools.groupby(lengths, lambda n: n <= 1024) if small]
    small_tiles = sum(lengths[tile[0]] <= 1024 for tile in held)
    assert small_tiles == sum(-(-len(run) // 16) for run in runs)


def test_tables_beyond_2_to_the_31_elements() -> None:
    lengths = [5, 2**31 + 7, 2**33, 3]
    tables = chunk_tables([2**40, 2**41, 2**45, 2**46], lengths, [0, 3, 0, 1], CHUNK_ELEMENTS)
    assert tables.chunks.dtype == np.int64
    assert tables.chunks[:, 2].sum() == sum(lengths)
    last_of_second = tables.chunks[tables.tensor_chunks[2] - 1]
    start = (2**31 + 7 - 1) // CHUNK_ELEMENTS * CHUNK_ELEMENTS
    assert last_of_second.tolist() == [2**41 + 2 * start, 32 + start, 2**31 + 7 - start, 3]
    assert tables.chunks[-1].tolist() == [2**46, 32 + 2**31 + 32 + 2**33, 3, 1]
    assert tables.arena_elements == 32 + 2**31 + 32 + 2**33 + 32


@every_case
def test_every_segment_shows_its_tensor(case: str) -> None:
    tensors = make(case)
    plan = plan_of(*tensors)
    plan.refresh()
    arena = torch.full((plan.arena_elements,), -1.0)
    for segment in plan.segments:
        segment.in_arena(arena).copy_(segment.flat)
        shaped = segment.shaped(arena)
        assert shaped.shape == segment.alias.shape
        torch.testing.assert_close(shaped, segment.alias.float(), rtol=0, atol=0)
    assert sum(s.flat.numel() for s in plan.segments) == plan.num_elements


def test_dense_tensors_are_never_copied() -> None:
    base = torch.randn(4, 6, 5, 3)
    dense = [
        base.clone(),
        base.clone().to(memory_format=torch.channels_last),
        base.clone().permute(3, 1, 0, 2),
        base.clone()[1:3],
        torch.randn(5, 1, 3)[:, 0],
        torch.tensor(1.0),
        torch.randn(0, 3),
        torch.randn(4, dtype=torch.cfloat),
    ]
    assert all(is_dense(t) for t in dense)
    assert not any(s.staged for s in plan_of(*dense).segments)
    strided = [base[:, :2], base[..., ::2], torch.randn(3, 1).expand(3, 4)]
    assert not any(is_dense(t) for t in strided)
    assert all(plan_of(t).segments[0].staged for t in strided)


def test_copies_of_strided_tensors_follow_and_are_carried_back() -> None:
    tensor = torch.arange(12.0).view(3, 4)[:, ::2]
    plan = plan_of(tensor)
    (segment,) = plan.segments
    tensor += 1
    plan.refresh()
    assert segment.flat.tolist() == [1, 3, 5, 7, 9, 11]
    segment.flat.zero_()
    plan.publish()
    assert tensor.tolist() == [[0, 0], [0, 0], [0, 0]]


def test_tied_tensors_count_once() -> None:
    a = torch.randn(3, 4)
    plan = plan_of(a, a, a.view(3, 4), a.t(), a.view(-1))
    assert [s.name for s in plan.segments] == ["t0"]
    strided = torch.randn(6, 6)[:, ::2]
    assert plan_of(strided, strided[:]).num_elements == 18


def test_interleaved_views_are_separate_tensors() -> None:
    base = torch.randn(6, 8)
    plan = plan_of(base[:, :3], base[:, 3:], torch.randn(2))
    assert plan.num_elements == 50
    assert plan_of(base[:, ::2], base[:, 1::2]).num_elements == 48
    assert plan_of(base[1, :3], base[:, 3:]).num_elements == 33


@pytest.mark.parametrize(
    "overlapping",
    [
        lambda b: (b[:4], b[3:]),
        lambda b: (b, b[2]),
        lambda b: (b[:, :4], b[:, 3:]),
        lambda b: (b.view(-1)[:10], b.view(-1)[:9]),
        lambda b: (b, b.view(torch.int32).view(torch.float32)[1:]),
        lambda b: (b[:, ::2], b[0]),
    ],
)
def test_partly_overlapping_tensors_are_refused(overlapping) -> None:  # type: ignore[no-untyped-def]
    first, second = overlapping(torch.randn(6, 8))
    with pytest.raises(ValueError, match="params: t1 and t2 overlap in memory without"):
        plan_of(torch.randn(3), first, second)


def test_chunk_size_must_keep_the_alignment() -> None:
    with pytest.raises(
        ValueError, match="chunk_elements: expected a positive multiple of 32, got 33"
    ):
        chunk_tables([], [], [], 33)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements_for_real() -> None:
    """One bf16 tensor of 2^31 + 100 elements and one arena: 12 GiB."""
    n = 2**31 + 100
    x = torch.ones(n, dtype=torch.bfloat16)
    x[-1] = 3.0
    plan = plan_of(x)
    operations = CpuBackend().bind(plan)
    running = torch.empty(plan.arena_elements)
    nothing = torch.from_numpy(np.zeros(plan.arena_elements, np.float32))  # only read: no memory
    operations.accumulate(running, None, first=True)
    operations.accumulate(running, None, first=False)
    assert running[n - 1].item() == 6.0
    assert running[2**31 - 1 : 2**31 + 1].tolist() == [2.0, 2.0]
    sums = operations.close_sum(running, nothing, nothing, 2)
    assert sums.norm == sums.mean_norm == n - 1 + 9.0
    operations.write_back(running, None, 0.25)
    assert x[-1].item() == 1.5
    assert x[2**31 - 1 : 2**31 + 1].tolist() == [0.5, 0.5]


def test_strided_views_are_compared_under_any_default_device() -> None:
    """Their spans meet, and they have no element in common."""
    whole = torch.zeros(16)
    with torch.device("meta"):
        plan = Plan([("even", whole[::2]), ("odd", whole[1::2])], torch.device("cpu"))
    assert len(plan.segments) == 2
