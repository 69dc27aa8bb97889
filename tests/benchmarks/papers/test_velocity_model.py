"""theory.velocity_model: values by hand, gaps against a literal loop and between the bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from papers.theory import (
    VelocityModel,
    algorithm_2,
    drop_count_bounds,
    gap_bounds,
    iteration_count_bounds,
    kappa_1,
    kappa_2,
    learning_rate,
)

PI = math.pi


# ---- the model ------------------------------------------------------------------------------


def test_velocity_derivative_and_threshold_by_hand():
    # gamma lr = 1/4, so 1 - 1 / (t/4 + 1); (pi/2) (1 + 0.4 / 2) = 0.6 pi
    model = VelocityModel(gamma=0.5, epsilon=0.4)
    assert model.velocity(0.0, 0.5) == 0
    assert model.velocity(4.0, 0.5) == pytest.approx(0.3 * PI)
    assert model.velocity(12.0, 0.5) == pytest.approx(0.45 * PI)
    assert model.limit(0.5) == pytest.approx(0.6 * PI)
    assert model.derivative(0.0, 0.5) == pytest.approx(0.15 * PI)
    assert model.derivative(4.0, 0.5) == pytest.approx(0.0375 * PI)
    assert model.threshold(0.5, 1.9) == 0.125
    assert model.threshold(0.5, 0.1) == 0.1
    # (1 + k/4)^2 = 0.15 pi / 0.125 = 1.2 pi, k = 4 (1.941626 - 1)
    assert model.gap_length(0.5, 1.9) == pytest.approx(3.76650, abs=1e-5)
    assert model.drop_gap(0.5, 1.9) == 4


def test_tensors_of_times():
    model = VelocityModel(gamma=0.5, epsilon=0.4)
    times = torch.tensor([0.0, 4.0, 12.0], dtype=torch.float64)
    assert model.velocity(times, 0.5).tolist() == pytest.approx([0, 0.3 * PI, 0.45 * PI])
    assert model.derivative(times, 0.5)[1].item() == pytest.approx(0.0375 * PI)


def test_the_derivative_is_the_velocitys():
    model = VelocityModel(gamma=0.3, epsilon=0.2)
    for t, lr in itertools.product((0.5, 3.0, 40.0), (1.0, 0.2)):
        h = 1e-4  # error of a central difference: h^2 times a third derivative below 1
        slope = (model.velocity(t + h, lr) - model.velocity(t - h, lr)) / (2 * h)
        assert model.derivative(t, lr) == pytest.approx(slope, abs=1e-7)


def test_the_model_has_property_p2():
    model = VelocityModel(gamma=0.05, epsilon=0.33)
    degrees = [math.degrees(model.limit(lr)) for lr in (1.0, 0.3, 0.1, 1e-6)]
    assert 90 < degrees[0] < 120  # i
    assert degrees == sorted(degrees, reverse=True)  # ii
    shares = [model.velocity(20.0, lr) / model.limit(lr) for lr in (1.0, 0.3, 0.1)]
    assert shares == sorted(shares, reverse=True)  # iii: the lower, the slower
    assert degrees[-1] == pytest.approx(90, abs=1e-4)  # iv


# ---- rates and gaps -------------------------------------------------------------------------


def test_both_sequences_by_hand():
    assert [learning_rate(i) for i in (0, 7, 26)] == pytest.approx([1, 1 / 4, 1 / 9])
    assert [learning_rate(i, "proof") for i in range(3)] == [1 / 2, 1 / 3, 1 / 4]
    # The theorem's breaks the condition (10) of the theorem that its proof applies.
    assert all(learning_rate(i) > 1 / (i + 2) for i in range(100))


models = st.tuples(
    st.floats(1e-4, 1.0),  # gamma
    st.floats(1e-6, 0.333),  # epsilon, for rates up to 1
    st.floats(1e-6, 1.99),  # tau0
    st.floats(1e-4, 1.0),  # lr
)


@given(models)
def test_gaps_lie_between_the_lemmas_bounds(arguments):
    gamma, epsilon, tau0, lr = arguments
    model = VelocityModel(gamma, epsilon)
    lower, upper = gap_bounds(lr, gamma, tau0)
    rounding = 1 + 1e-12  # of a few float64 operations
    assert lower <= model.gap_length(lr, tau0) * rounding
    assert model.gap_length(lr, tau0) <= upper * rounding
    assert lower <= model.drop_gap(lr, tau0) * rounding
    assert model.drop_gap(lr, tau0) <= upper * rounding


@given(models)
def test_the_gap_is_the_first_integer_at_the_threshold(arguments):
    gamma, epsilon, tau0, lr = arguments
    model = VelocityModel(gamma, epsilon)
    gap, threshold = model.drop_gap(lr, tau0), model.threshold(lr, tau0)
    assert model.derivative(float(gap), lr) <= threshold < model.derivative(float(gap - 1), lr)
    # The proof's real k solves v' = tau; 1e-9: cancellation of sqrt(...) - 1 for the steepest.
    length = model.gap_length(lr, tau0)
    assert model.derivative(length, lr) == pytest.approx(threshold, rel=1e-9)
    assert gap - 1 <= length * (1 + 1e-9)
    assert length <= gap * (1 + 1e-9)


@pytest.mark.parametrize("gamma", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("tau0", [1e-3, 0.4, 1.5])
@pytest.mark.parametrize("sequence", ["theorem", "proof"])
def test_algorithm_2_is_the_printed_loop(gamma, tau0, sequence):
    model = VelocityModel(gamma, epsilon=0.2)
    rates = [learning_rate(i, sequence) for i in range(8)]
    starts = [0]  # the loop as printed, n = 8
    i, t = 0, 0
    while i < 8:
        if model.derivative(float(t - starts[i]), rates[i]) <= min(tau0, gamma * rates[i] / 2):
            i += 1
            starts.append(t)
        t += 1
    phases = list(algorithm_2(model, tau0, rates))
    assert [phase.start for phase in phases] == starts[:-1]
    assert [phase.start + phase.gap for phase in phases] == starts[1:]
    assert [phase.lr for phase in phases] == rates
    assert [phase.index for phase in phases] == list(range(8))


@pytest.mark.parametrize("tau0", [1e-3, 0.4, 1.5])
def test_iterations_and_drops_lie_between_the_lemmas_bounds(tau0):
    gamma = 0.5
    constants = kappa_1(gamma), kappa_2(gamma, tau0)
    rates = [learning_rate(i, "proof") for i in range(200)]
    total = 0
    for n, phase in enumerate(algorithm_2(VelocityModel(gamma, 0.5), tau0, rates), start=1):
        total += phase.gap
        lower, upper = iteration_count_bounds(n, *constants)
        assert lower <= total <= upper
        fewest, most = drop_count_bounds(total, *constants)
        assert fewest <= n <= most


def test_kappas_by_hand_and_their_misprints():
    assert kappa_1(0.5) == pytest.approx(2 * 0.7724538509)
    assert kappa_2(0.5, 0.375) == pytest.approx(2 * math.sqrt(16 * PI / 9))
    # UAI's kappa_1, sqrt(pi - 1) / gamma: no lower bound on this gap.
    model = VelocityModel(gamma=0.01, epsilon=0.01)
    assert kappa_1(0.01) <= model.drop_gap(1.0, 1.0) < math.sqrt(PI - 1) / 0.01
    # The printed kappa_2 with tau0 above 1/2: no upper bound on this one.
    steep = VelocityModel(gamma=0.01, epsilon=0.33)
    assert math.sqrt(2 * PI / (3 * 1.9)) / 0.01 < steep.drop_gap(1.0, 1.9) <= kappa_2(0.01, 1.9)
    # Of the real gap the printed one is a bound up to tau0 = 1.912, and then no longer.
    assert steep.gap_length(1.0, 1.9) < math.sqrt(2 * PI / (3 * 1.9)) / 0.01
    last = 2 * PI / (3 * (math.sqrt(4 * PI / 3) - 1) ** 2)
    assert last == pytest.approx(1.912, abs=5e-4)
    steepest = VelocityModel(gamma=0.01, epsilon=0.3333)
    assert steepest.gap_length(1.0, last) < math.sqrt(2 * PI / (3 * last)) / 0.01
    assert steepest.gap_length(1.0, 1.99) > math.sqrt(2 * PI / (3 * 1.99)) / 0.01
    # And (38) without its silent gamma lr <= 1.
    short = VelocityModel(gamma=1000.0, epsilon=0.33)
    assert kappa_2(1000.0, 0.4) < short.gap_length(1.0, 0.4)


def test_the_threshold_is_met_far_from_saturation():
    """What draw.py says: at gamma lr / 2 the velocity is at 44 to 51 % of its limit."""
    for epsilon in (1e-6, 0.1, 0.333):
        model = VelocityModel(1e-4, epsilon)
        share = model.velocity(model.gap_length(1.0, 1.0), 1.0) / model.limit(1.0)
        assert 0.43 < share < 0.52


def test_gaps_too_long_for_exact_integers_still_end():
    model = VelocityModel(gamma=1e-18, epsilon=0.1)
    assert model.drop_gap(1.0, 1.0) == pytest.approx(model.gap_length(1.0, 1.0), rel=1e-15)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VelocityModel(0.0, 0.1), ValueError, "gamma: expected a finite number above 0"),
        (lambda: VelocityModel(0.1, None), TypeError, "epsilon: .* got None"),
        (
            lambda: VelocityModel(1.0, 0.4).limit(1.0),
            ValueError,
            r"epsilon: .* 1 / \(3 lr\) = 0.33",
        ),
        (lambda: VelocityModel(1.0, 0.1).limit(0.0), ValueError, "lr: .* above 0, got 0.0"),
        (lambda: VelocityModel(1.0, 0.1).threshold(1.0, 2.0), ValueError, "tau0: .* got 2.0"),
        (lambda: learning_rate(-1), ValueError, "i: expected at least 0, got -1"),
        (lambda: learning_rate(0, "papers"), ValueError, "sequence: expected 'theorem' or 'proof'"),
        (lambda: gap_bounds(0.5, 2.1, 0.1), ValueError, "gamma: expected at most 1 / lr = 2, got"),
        (lambda: kappa_2(1.0, 0.0), ValueError, "tau0: expected a number between 0 and 2"),
        (lambda: iteration_count_bounds(0, 1.0, 2.0), ValueError, "n: expected at least 1"),
        (lambda: iteration_count_bounds(1, 2.0, 1.0), ValueError, "kappa2: .* at least kappa1"),
        (lambda: drop_count_bounds(1.5, 1.0, 2.0), TypeError, "iterations: expected an int"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
