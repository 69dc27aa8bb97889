"""theory.bounds: by hand, against each other, and against a run that they must hold for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from papers.theory import (
    Problem,
    UnifiedMomentum,
    VelocityModel,
    algorithm_2,
    bound_after_drops,
    bound_after_iterations,
    kappa_1,
    kappa_2,
    learning_rate,
    schedule_bound,
)

PROBLEM = Problem(excess=3.0, distance=2.0, gradient=1.0, noise=2.0, momentum=0.5, s=1.0)


def test_inequality_31_by_hand():
    # Three iterations at 1/2, two at 1/4: sum_i 3/4, sum_t 2; alpha_t alpha_{t-1}: three of 1/4,
    # 1/8 and 1/16. (1 - b) d^2 / 2 = 1, b e / (1 - b) 3/4 = 9/4,
    # (2 s b + 1) (G^2 + delta^2) / (2 (1 - b)) = 10.
    expected = (1 + 9 / 4 + 10 * 15 / 16) / 2
    assert schedule_bound(PROBLEM, [1 / 2, 1 / 4], [3, 2]) == pytest.approx(expected)


def test_schedule_bound_takes_numpys_numbers():
    # In int32 and float32 the sum of alpha_t would wrap at 2^31 and round at the seventh digit.
    rates, gaps = [1 / 2, 1 / 3], [2**31 - 1, 2**31 - 1]
    expected = schedule_bound(PROBLEM, rates, gaps)
    assert schedule_bound(PROBLEM, np.array(rates), np.array(gaps, np.int32)) == expected
    with pytest.raises(TypeError, match=r"gaps\[1\]: expected an int, got"):
        schedule_bound(PROBLEM, rates, [1, np.float64(2.0)])


def test_theorem_5_1_by_hand():
    # n = 3: log 4 - log 2 = log 2, log 3; n kappa1 = 6
    expected = (1 + 3 * math.log(2) + 10 * 5 * math.log(3)) / 6
    printed = bound_after_drops(PROBLEM, 3, 2.0, 5.0, sums="printed")
    assert printed == pytest.approx(expected)
    # 1/2 + 1/3 + 1/4 and 1 + 1/2 + 1/3
    exact = (1 + 3 * 13 / 12 + 10 * 5 * 11 / 6) / 6
    assert bound_after_drops(PROBLEM, 3, 2.0, 5.0) == pytest.approx(exact)


def test_theorem_5_2_by_hand():
    # T = 128, kappa2 = 4, kappa1 = 1: 8 - 3 = 5 <= n <= 16
    expected = (1 + 3 * (math.log(17) - math.log(2)) + 10 * 4 * math.log(16)) / 5
    assert bound_after_iterations(PROBLEM, 128, 1.0, 4.0) == pytest.approx(expected)


def test_the_printed_sums_are_smaller_than_what_they_bound():
    for n in (1, 2, 10, 1000):
        printed = bound_after_drops(PROBLEM, n, 1.0, 1.0, sums="printed")
        assert printed < bound_after_drops(PROBLEM, n, 1.0, 1.0)
    # The sums differ by less than 1 and 1/2 for every n, so that the gap closes like 1 / n.
    assert bound_after_drops(PROBLEM, 10**5, 1.0, 1.0) < 1.1 * printed


def test_each_bound_is_looser_than_the_one_it_is_made_from():
    gamma, tau0 = 0.5, 0.3
    constants = kappa_1(gamma), kappa_2(gamma, tau0)
    for n in (3, 30, 300):
        rates = [learning_rate(i, "proof") for i in range(n)]
        gaps = [phase.gap for phase in algorithm_2(VelocityModel(gamma, 0.5), tau0, rates)]
        scheduled = schedule_bound(PROBLEM, rates, gaps)
        after_drops = bound_after_drops(PROBLEM, n, *constants)
        assert scheduled <= after_drops
        if sum(gaps) > 4.5 * constants[1]:
            printed = bound_after_drops(PROBLEM, n, *constants, sums="printed")
            assert printed <= bound_after_iterations(PROBLEM, sum(gaps), *constants)


def test_the_rate_of_convergence_is_log_n_over_n_and_log_t_over_root_t():
    # The logarithms, because exact sums of 10^8 terms take a minute; they differ by below 1.
    ratio = bound_after_drops(PROBLEM, 10**8, 1.0, 1.0, sums="printed") / bound_after_drops(
        PROBLEM, 10**4, 1.0, 1.0, sums="printed"
    )
    # log n / n would give 2e-4; the terms without a logarithm keep it a little below. UAI 2024's
    # printed log n / sqrt(n) would give 2e-2.
    assert 1.8e-4 < ratio < 2.1e-4
    slow = bound_after_iterations(PROBLEM, 10**16, 1.0, 1.0)
    assert 1.8e-4 < slow / bound_after_iterations(PROBLEM, 10**8, 1.0, 1.0) < 2.1e-4


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
def test_a_run_of_unified_momentum_stays_below_the_bound(s):
    """``f(x) = |x|`` with noise, Algorithm 2's rates, mean over 2,000 runs."""
    model, tau0 = VelocityModel(0.5, 0.5), 0.3
    rates = [learning_rate(i, "proof") for i in range(12)]
    gaps = [phase.gap for phase in algorithm_2(model, tau0, rates)]
    problem = Problem(excess=2.0, distance=2.0, gradient=1.0, noise=0.5, momentum=0.5, s=s)
    x = torch.nn.Parameter(torch.full((2000,), 2.0, dtype=torch.float64))
    optimizer = UnifiedMomentum([x], momentum=0.5, s=s)
    random = torch.Generator().manual_seed(0)
    best = math.inf
    for rate, gap in zip(rates, gaps, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(gap):
            best = min(best, x.detach().abs().mean().item())
            noise = torch.randn(2000, generator=random, dtype=torch.float64)
            x.grad = x.detach().sign() + 0.5 * noise
            optimizer.step()
    bound = schedule_bound(problem, rates, gaps)
    assert 0 < best < bound
    assert bound < 2.0  # below what the run starts from, so that it says something


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Problem(-1.0, 1.0, 1.0, 1.0),
            ValueError,
            "excess: expected a finite number of at",
        ),
        (
            lambda: Problem(1.0, 1.0, 1.0, 1.0, 1.0),
            ValueError,
            "momentum: expected a number from 0",
        ),
        (lambda: Problem(1.0, 1.0, "1", 1.0), TypeError, "gradient: .* got '1'"),
        (lambda: schedule_bound(PROBLEM, [0.5], []), ValueError, "gaps: expected one per rate"),
        (lambda: schedule_bound(PROBLEM, [], []), ValueError, "gaps: .* at least one"),
        (
            lambda: schedule_bound(PROBLEM, [0.1, 0.5], [1, 1]),
            ValueError,
            r"rates\[1\]: .* got 0.5",
        ),
        (lambda: schedule_bound(PROBLEM, [1.5], [1]), ValueError, r"rates\[0\]: .* at most 1"),
        (
            lambda: schedule_bound(PROBLEM, [0.5], [0]),
            ValueError,
            r"gaps\[0\]: expected at least 1",
        ),
        (lambda: bound_after_drops(PROBLEM, 0, 1.0, 1.0), ValueError, "n: expected at least 1"),
        (lambda: bound_after_drops(PROBLEM, 1, 0.0, 1.0), ValueError, "kappa1: .* above 0"),
        (
            lambda: bound_after_drops(PROBLEM, 1, 1.0, 1.0, sums="integral"),
            ValueError,
            "sums: expected 'printed' or 'exact', got 'integral'",
        ),
        (
            lambda: bound_after_iterations(PROBLEM, 9, 1.0, 2.0),
            ValueError,
            "iterations: expected more than 9 kappa2 / 2 = 9, got 9",
        ),
        (lambda: PROBLEM.bound(1.0, 0.0, 1.0), ValueError, "iterations: .* above 0"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
