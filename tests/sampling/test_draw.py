"""Which chunks are read, and what their scatter says: arithmetic without a meter."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cases import BACKENDS, every_backend, make
from hypothesis import given
from hypothesis import strategies as st

from autodrop_ext.ops.device_sums import Arenas
from autodrop_ext.ops.plan import Plan
from autodrop_ext.sampling.auto import FRACTIONS, PILOT_FRACTION, PILOT_READINGS, AutoFraction
from autodrop_ext.sampling.draw import (
    CHUNK_ELEMENTS,
    LEAST_CHUNKS,
    Choice,
    Sample,
    choose,
    chunk_starts,
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
def test_a_choice_draws_every_stratum_without_repetition(
    lengths: list[int], fraction: float, seed: int, sized: bool
) -> None:
    labels = [f"t{i}" for i in range(len(lengths))]
    counts = [len(chunk_starts(n)) - 1 for n in lengths]
    random = np.random.default_rng(seed)
    sizes = [random.pareto(0.7, count) for count in counts] if sized else None
    choice = choose(lengths, labels, Sample(fraction, seed), sizes)
    assert choice == choice and _same(
        choice, choose(lengths, labels, Sample(fraction, seed), sizes)
    )
    assert (np.diff(choice.tensor) >= 0).all() and (np.diff(choice.stratum) >= 0).all()
    assert (np.bincount(choice.stratum, minlength=len(choice.taken)) == choice.taken).all()
    assert (choice.taken <= choice.population).all()
    # Strata cover every chunk of every tensor once, and show their scatter unless read completely.
    covered = np.bincount(choice.stratum_tensor, choice.population, len(lengths))
    assert covered.tolist() == counts
    assert ((choice.taken >= 2) | (choice.taken == choice.population)).all()
    drawn = list(zip(choice.tensor.tolist(), choice.start.tolist(), strict=True))
    assert len(set(drawn)) == len(drawn)
    for t, start in drawn:
        assert start in chunk_starts(lengths[t])
    read = np.bincount(choice.tensor, minlength=len(lengths))
    assert (read >= np.minimum(counts, LEAST_CHUNKS)).all()
    # The floor of two, and roundings, are all that comes on top of the fraction.
    assert len(drawn) <= fraction * sum(counts) + (LEAST_CHUNKS + 1) * len(lengths)


def _same(a: Choice, b: Choice) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def test_seed_label_and_size_of_the_sample_decide_the_choice() -> None:
    base = choose([200_000], ["w|(200, 1000)|()"], Sample(1 / 8, 0))
    assert not _same(base, choose([200_000], ["w|(200, 1000)|()"], Sample(1 / 8, 1)))
    assert not _same(base, choose([200_000], ["w|(200, 1000)|(1,)"], Sample(1 / 8, 0)))
    larger = choose([200_000], ["w|(200, 1000)|()"], Sample(1 / 4, 0))
    assert set(base.start.tolist()) < set(larger.start.tolist())
    # The random words are the same in all versions of numpy: a change would break checkpoints.
    assert sorted(choose([30_000], ["w"], Sample(1 / 8, 0)).start.tolist()) == PINNED


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


def rows_of(choice: Choice, lengths: list[int], tables: list[np.ndarray]) -> np.ndarray:
    places = [
        np.searchsorted(chunk_starts(n), choice.start[choice.tensor == t])
        for t, n in enumerate(lengths)
    ]
    return np.concatenate([table[at] for table, at in zip(tables, places, strict=True)])


@pytest.mark.parametrize("sized", [False, True])
def test_estimates_and_their_covariances_are_unbiased(sized: bool) -> None:
    lengths, tables = population()
    exact = sum(table.sum(axis=0) for table in tables)
    sizes = [table[:, 1] ** 0.8 for table in tables] if sized else None
    estimates, moments = [], []
    for seed in range(2000):
        choice = choose(lengths, ["a", "b", "c"], Sample(1 / 4, seed), sizes)
        rows = rows_of(choice, lengths, tables)
        estimates.append((rows * choice.expansion[:, None]).sum(axis=0))
        of_stratum = variances(scatter(rows, choice), choice.population, choice.taken)
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
    choice = choose(lengths, ["a", "b", "c"], Sample(1 / 3, 7), [t[:, 1] for t in tables])
    rows = rows_of(choice, lengths, tables)
    dot, norm, previous = (rows * choice.expansion[:, None]).sum(axis=0)
    cosine = dot / math.sqrt(norm * previous)
    residual = rows[:, 0] / math.sqrt(norm * previous)
    residual -= cosine / 2 * (rows[:, 1] / norm + rows[:, 2] / previous)
    variance = freedom = 0.0
    for h, (count, taken) in enumerate(zip(choice.population, choice.taken, strict=True)):
        if taken == count:
            continue
        part = count * (count - taken) / taken * residual[choice.stratum == h].var(ddof=1)
        variance += part
        freedom += part**2 / (taken - 1)
    of_stratum = variances(scatter(rows, choice), choice.population, choice.taken)
    total = of_stratum.sum(axis=0)
    got = standard_error(dot, norm, previous, total)
    wanted = math.degrees(math.sqrt(variance)) / math.sqrt(1 - cosine**2)
    # The first order of the arc cosine; at an error of 5 degrees the second weighs 1 %.
    assert got == pytest.approx(wanted, rel=0.01)
    products = squares(of_stratum, choice.taken, np.ones(len(of_stratum)))
    degrees = variance**2 / freedom
    student = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 10: 2.23, 30: 2.04, 1000: 1.96}
    inverse, quantiles = np.array(sorted((1 / d, t) for d, t in student.items())).T
    table = float(np.interp(1 / degrees, inverse, quantiles))
    # Both tables are interpolated.
    assert margin(dot, norm, previous, total, products) == pytest.approx(got * table, rel=0.03)


def test_no_error_where_everything_is_read_or_nothing_defined() -> None:
    lengths, tables = population()
    choice = choose(lengths, ["a", "b", "c"], Sample(1.0, 0))
    rows = rows_of(choice, lengths, tables)
    of_stratum = variances(scatter(rows, choice), choice.population, choice.taken)
    assert not of_stratum.any()
    sums = (rows * choice.expansion[:, None]).sum(axis=0)
    assert standard_error(*sums, of_stratum.sum(axis=0)) == 0.0
    assert math.isnan(standard_error(0.0, 0.0, 1.0, [0.0] * 6))
    assert math.isnan(margin(0.0, 0.0, 1.0, [0.0] * 6, [0.0] * 21))


@pytest.mark.parametrize("form", ["sum", "delta"])
@pytest.mark.parametrize("case", ["mixed dtypes", "layouts"])
@every_backend
def test_sampled_arenas_have_the_bits_of_the_reference(case: str, backend: str, form: str) -> None:
    """And, chunk by chunk, those of an exact meter."""
    results = []
    for name, sample in ((backend, Sample(1 / 8)), ("reference", Sample(1 / 8)), (backend, None)):
        tensors = make(case)
        plan = Plan([(f"t{i}", t) for i, t in enumerate(tensors)], CPU, sample=sample)
        arenas = Arenas(plan, BACKENDS[name])
        for step in range(6):
            for i, tensor in enumerate(tensors):
                tensor.mul_(1 + 0.01 * ((i + step) % 3))
            arenas.begin(form) if step == 0 else arenas.accumulate(first=step % 2 == 0)
            if step % 2:
                sums = arenas.close(2)
        results.append((arenas, sums))
    (ours, sums), (reference, expected), (exact, _) = results
    for role in Arenas.ROLES:
        got = getattr(ours, role)
        assert torch.equal(got.view(torch.int32), getattr(reference, role).view(torch.int32))
        choice = ours.plan.choice
        assert choice is not None
        offsets = ours.plan.chunks[:, 1].tolist()
        for t, start, n, offset in zip(
            choice.tensor.tolist(),
            choice.start.tolist(),
            choice.length.tolist(),
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
    plan = Plan([(f"t{i}", t) for i, t in enumerate(tensors)], CPU, sample=Sample(1 / 8))
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
        found = survey.sizes[segment.name]
        for c, (a, b) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            moves = [float(((y[i] - x[i])[a:b] ** 2).sum()) for x, y in itertools.pairwise(states)]
            # One of the three windows; float32 squares and sums of 32, 2^-24 each.
            assert min(abs(found[c] / m - 1) for m in moves) < 1e-5


def test_surveys_of_large_models_take_more_windows() -> None:
    assert num_windows(10) == 1
    assert num_windows(5 * 2**20) == 5
    assert num_windows(1e12) == MOST_WINDOWS
    assert num_windows(None) == MOST_WINDOWS


def test_the_fraction_is_the_smallest_that_is_precise_enough_in_the_worst_reading() -> None:
    auto = AutoFraction(0.01)
    assert auto.start(1e9) == PILOT_FRACTION
    assert auto.start(None) == PILOT_FRACTION

    # At 90 degrees with unit norms the error is the square root of the first moment, in radians.
    def moments(worst: float) -> list[list[float]]:
        errors = [math.radians(worst) * math.sqrt((1 - f) / f / 63) for f in FRACTIONS]
        return [[e**2, 0, 0, 0, 0, 0] for e in errors]

    for worst in (0.01, 0.05, 0.02)[:PILOT_READINGS]:
        assert auto.chosen is None
        auto.take([0.0, 1.0, 1.0], moments(worst))
    # 0.05 at 1/64; 1/1.66 would do: sqrt((1 - f) / f / 63) = 0.2 at f = 0.284.
    assert auto.chosen == 1 / 2


def test_a_model_too_small_for_any_sample_is_read_completely(
    caplog: pytest.LogCaptureFixture,
) -> None:
    auto = AutoFraction(0.01)
    assert auto.start(5e6) == auto.chosen == 1.0
    assert "all parameters are read" in caplog.text
