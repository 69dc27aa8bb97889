"""Which chunks are read, and what their scatter says: arithmetic without a meter."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS, every_backend, make
from hypothesis import given
from hypothesis import strategies as st

from autodrop_ext.ops.device_sums import DeviceSums
from autodrop_ext.ops.plan import Plan, Ranges
from autodrop_ext.sampling.draw import (
    CHUNK_ELEMENTS,
    LEAST_CHUNKS,
    DrawnChunks,
    Sample,
    chunk_starts,
    draw,
)
from autodrop_ext.sampling.error import margin, scatter, squares, standard_error, variances
from autodrop_ext.sampling.survey import MOST_WINDOWS, Survey, num_windows

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(0, 60_000), min_size=1, max_size=8)


@given(st.integers(0, 10_000_000))
def test_chunks_of_a_tensor_are_nearly_equal(elements: int) -> None:
    starts = chunk_starts(elements)
    lengths = np.diff(starts)
    assert starts[0] == 0 and lengths.sum() == elements
    assert len(lengths) == -(-elements // CHUNK_ELEMENTS)
    assert (starts[:-1] % 32 == 0).all()
    assert (lengths <= CHUNK_ELEMENTS).all() and (lengths > 0).all()
    if len(lengths) > 1:
        # A unit of 32 more or less, and the last unit may be short.
        assert lengths.max() - lengths.min() < 64


@given(LENGTHS, st.sampled_from([1 / 64, 1 / 8, 1 / 2, 1.0]), st.integers(0, 5), st.booleans())
def test_every_stratum_is_drawn_without_repetition(
    lengths: list[int], fraction: float, seed: int, surveyed: bool
) -> None:
    labels = [f"t{i}" for i in range(len(lengths))]
    counts = [len(chunk_starts(n)) - 1 for n in lengths]
    random = np.random.default_rng(seed)
    motion = [random.pareto(0.7, count) for count in counts] if surveyed else None
    drawn = draw(lengths, labels, Sample(fraction, seed), motion)
    assert _same(drawn, draw(lengths, labels, Sample(fraction, seed), motion))
    assert (np.diff(drawn.tensor) >= 0).all() and (np.diff(drawn.stratum) >= 0).all()
    assert (np.bincount(drawn.stratum, minlength=len(drawn.taken)) == drawn.taken).all()
    assert (drawn.taken <= drawn.population).all()
    # Strata cover every chunk of every tensor once, and show their scatter unless read completely.
    covered = np.bincount(drawn.stratum_tensor, drawn.population, len(lengths))
    assert covered.tolist() == counts
    assert ((drawn.taken >= 2) | (drawn.taken == drawn.population)).all()
    places = list(zip(drawn.tensor.tolist(), drawn.start.tolist(), strict=True))
    assert len(set(places)) == len(places)
    for t, start in places:
        assert start in chunk_starts(lengths[t])
    read = np.bincount(drawn.tensor, minlength=len(lengths))
    assert (read >= np.minimum(counts, LEAST_CHUNKS)).all()
    # The floor of two, and roundings, are all that comes on top of the fraction.
    assert len(places) <= fraction * sum(counts) + (LEAST_CHUNKS + 1) * len(lengths)


def _same(a: DrawnChunks, b: DrawnChunks) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def test_seed_label_and_size_of_the_sample_decide_the_choice() -> None:
    base = draw([200_000], ["w|(200, 1000)|()"], Sample(1 / 8, 0))
    assert not _same(base, draw([200_000], ["w|(200, 1000)|()"], Sample(1 / 8, 1)))
    assert not _same(base, draw([200_000], ["w|(200, 1000)|(1,)"], Sample(1 / 8, 0)))
    larger = draw([200_000], ["w|(200, 1000)|()"], Sample(1 / 4, 0))
    assert set(base.start.tolist()) < set(larger.start.tolist())
    # The random words are the same in all versions of numpy: a change would break checkpoints.
    assert sorted(draw([30_000], ["w"], Sample(1 / 8, 0)).start.tolist()) == PINNED


@pytest.mark.parametrize("seed", range(4))
def test_chunks_that_make_most_of_the_motion_are_read_for_certain(seed: int) -> None:
    motion = np.random.default_rng(seed).uniform(0.5, 1.5, 400)
    far = np.array([3, 100, 101, 250, 399])
    motion[far] *= 1000
    drawn = draw([400 * CHUNK_ELEMENTS], ["w"], Sample(1 / 8, seed), [motion])
    certain = drawn.index[(drawn.taken == drawn.population)[drawn.stratum]]
    assert certain.tolist() == far.tolist()
    assert (drawn.expansion[np.isin(drawn.index, far)] == 1).all()
    starts = chunk_starts(400 * CHUNK_ELEMENTS)
    assert (starts[drawn.index] == drawn.start).all()


PINNED = [0, 10976, 12000, 13984]


def population(seed: int = 0) -> tuple[list[int], list[np.ndarray]]:
    """Sums of every chunk of three tensors, with few that make most of the motion."""
    random = np.random.default_rng(seed)
    lengths = [40_000, 150_000, 3_000]
    tables = []
    for t, elements in enumerate(lengths):
        count = len(chunk_starts(elements)) - 1
        norm = random.lognormal(t, 1.5, count)
        previous = norm * random.lognormal(0, 0.3, count)
        dot = np.sqrt(norm * previous) * np.clip(random.normal(0.5 - 0.2 * t, 0.2, count), -1, 1)
        tables.append(np.stack([dot, norm, previous], axis=1))
    return lengths, tables


def rows_of(drawn: DrawnChunks, lengths: list[int], tables: list[np.ndarray]) -> np.ndarray:
    places = [
        np.searchsorted(chunk_starts(n), drawn.start[drawn.tensor == t])
        for t, n in enumerate(lengths)
    ]
    return np.concatenate([table[at] for table, at in zip(tables, places, strict=True)])


@pytest.mark.parametrize("surveyed", [False, True])
def test_estimates_and_their_covariances_are_unbiased(surveyed: bool) -> None:
    lengths, tables = population()
    exact = sum(table.sum(axis=0) for table in tables)
    motion = [table[:, 1] ** 0.8 for table in tables] if surveyed else None
    estimates, moments = [], []
    for seed in range(2000):
        drawn = draw(lengths, ["a", "b", "c"], Sample(1 / 4, seed), motion)
        rows = rows_of(drawn, lengths, tables)
        estimates.append((rows * drawn.expansion[:, None]).sum(axis=0))
        of_stratum = variances(scatter(rows, drawn), drawn.population, drawn.taken)
        moments.append(of_stratum.sum(axis=0))
    spread = np.cov(np.array(estimates).T)
    error = np.sqrt(np.diag(spread) / 2000)
    # Four standard errors of a mean over 2,000 seeds: one in 16,000 sets of seeds would fail.
    assert (np.abs(np.mean(estimates, axis=0) - exact) < 4 * error).all()
    # A sample variance of skew estimates over 2,000 seeds is known to about 10 %, a covariance to
    # as much of the two standard deviations.
    i, j = np.triu_indices(3)
    scale = np.sqrt(spread[i, i] * spread[j, j])
    assert (np.abs(np.mean(moments, axis=0) - spread[i, j]) < 0.1 * scale).all()


def test_the_standard_error_is_that_of_the_angle() -> None:
    """Against the linearised residuals of each chunk, computed another way."""
    lengths, tables = population(1)
    drawn = draw(lengths, ["a", "b", "c"], Sample(1 / 3, 7), [t[:, 1] for t in tables])
    rows = rows_of(drawn, lengths, tables)
    dot, norm, previous = (rows * drawn.expansion[:, None]).sum(axis=0)
    cosine = dot / math.sqrt(norm * previous)
    residual = rows[:, 0] / math.sqrt(norm * previous)
    residual -= cosine / 2 * (rows[:, 1] / norm + rows[:, 2] / previous)
    variance = freedom = 0.0
    for h, (count, taken) in enumerate(zip(drawn.population, drawn.taken, strict=True)):
        if taken == count:
            continue
        part = count * (count - taken) / taken * residual[drawn.stratum == h].var(ddof=1)
        variance += part
        freedom += part**2 / (taken - 1)
    of_stratum = variances(scatter(rows, drawn), drawn.population, drawn.taken)
    total = of_stratum.sum(axis=0)
    got = standard_error(dot, norm, previous, total)
    wanted = math.degrees(math.sqrt(variance)) / math.sqrt(1 - cosine**2)
    # The first order of the arc cosine; at an error of 5 degrees the second weighs 1 %.
    assert got == pytest.approx(wanted, rel=0.01)
    products = squares(of_stratum, drawn.taken, np.ones(len(of_stratum)))
    degrees = variance**2 / freedom
    student = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 10: 2.23, 30: 2.04, 1000: 1.96}
    inverse, quantiles = np.array(sorted((1 / d, t) for d, t in student.items())).T
    table = float(np.interp(1 / degrees, inverse, quantiles))
    # Both tables are interpolated.
    assert margin(dot, norm, previous, total, products) == pytest.approx(got * table, rel=0.03)


def test_no_error_where_everything_is_read_or_nothing_defined() -> None:
    lengths, tables = population()
    drawn = draw(lengths, ["a", "b", "c"], Sample(1.0, 0))
    rows = rows_of(drawn, lengths, tables)
    of_stratum = variances(scatter(rows, drawn), drawn.population, drawn.taken)
    assert not of_stratum.any()
    sums = (rows * drawn.expansion[:, None]).sum(axis=0)
    assert standard_error(*sums, of_stratum.sum(axis=0)) == 0.0
    assert math.isnan(standard_error(0.0, 0.0, 1.0, [0.0] * 6))
    assert math.isnan(margin(0.0, 0.0, 1.0, [0.0] * 6, [0.0] * 21))


@pytest.mark.parametrize("form", ["sum", "delta"])
@pytest.mark.parametrize("case", ["mixed dtypes", "layouts"])
@every_backend
def test_sampled_sums_have_the_bits_of_the_reference(case: str, backend: str, form: Any) -> None:
    """And, chunk by chunk, those of sums of everything."""
    results = []
    for name, sample in ((backend, 1 / 8), ("reference", 1 / 8), (backend, None)):
        tensors = make(case)
        named = [(f"t{i}", t) for i, t in enumerate(tensors)]
        plan = Plan(named, CPU)
        drawn = draw([s.flat.numel() for s in plan.segments], [n for n, _ in named], Sample(1 / 8))
        if sample is not None:
            ranges = Ranges(drawn.tensor, drawn.start, drawn.length, drawn.expansion)
            plan = Plan(named, CPU, ranges=ranges)
        mine = DeviceSums(plan, BACKENDS[name])
        for step in range(6):
            for i, tensor in enumerate(tensors):
                tensor.mul_(1 + 0.01 * ((i + step) % 3))
            mine.begin(form) if step == 0 else mine.add(first=step % 2 == 0)
            if step % 2:
                sums = mine.close(2)
        results.append((mine, sums))
    (ours, sums), (reference, expected), (exact, _) = results
    for role in ("running", "previous", "before"):
        got = getattr(ours, role)
        assert torch.equal(got.view(torch.int32), getattr(reference, role).view(torch.int32))
        offsets = ours.plan.chunks[:, 1].tolist()
        for t, start, n, offset in zip(
            drawn.tensor.tolist(),
            drawn.start.tolist(),
            drawn.length.tolist(),
            offsets,
            strict=True,
        ):
            whole = exact.plan.segments[t].in_arena(getattr(exact, role))[start : start + n]
            assert torch.equal(got[offset : offset + n], whole)
    # Float64 sums in another order.
    assert list(sums) == pytest.approx(list(expected), rel=1e-10, abs=1e-300)


def test_a_survey_finds_how_far_each_chunk_moves() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(70_000, generator=generator),
        torch.randn(5, generator=generator).double(),
        torch.randn(300, 40, generator=generator).bfloat16().t(),
        torch.randn(100, 100, generator=generator)[:, ::2],
        torch.empty(0),
    ]
    plan = Plan([(f"t{i}", t) for i, t in enumerate(tensors)], CPU)
    survey = Survey([plan], windows=3)
    states = []
    while not survey.done:
        plan.refresh()
        states.append([s.flat.double().clone() for s in plan.segments])
        survey.step()
        for tensor in tensors:
            tensor.mul_(1.5)
    assert len(states) == 4 and survey.device_bytes == 0
    for i, segment in enumerate(plan.segments):
        starts = chunk_starts(segment.flat.numel())
        found = survey.motion[segment.name]
        for c, (a, b) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            moves = [float(((y[i] - x[i])[a:b] ** 2).sum()) for x, y in itertools.pairwise(states)]
            # One of the three windows; float32 squares and sums of 32, 2^-24 each.
            assert min(abs(found[c] / m - 1) for m in moves) < 1e-5


def test_surveys_of_large_models_take_more_windows() -> None:
    assert num_windows(10) == 1
    assert num_windows(5 * 2**20) == 5
    assert num_windows(1e12) == MOST_WINDOWS
    assert num_windows(None) == MOST_WINDOWS
