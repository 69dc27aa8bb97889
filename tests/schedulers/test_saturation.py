"""The filter and the decision, against an independent implementation and by hand."""

from __future__ import annotations

import math

import independent
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodrop_ext.schedulers.saturation import SaturationDetector, Seen, Verdict, gaussian_filter


@given(
    st.lists(st.floats(0, 180), min_size=1, max_size=12),
    st.integers(1, 12),
    st.sampled_from(["value", "time"]),
)
def test_filter_matches_its_formula(values: list[float], m: int, kernel: str) -> None:
    b = np.array(values)
    sigma = min(b.std(), m / 2)
    got = gaussian_filter(values, m, kernel)
    assert min(values) - 1e-9 <= got <= max(values) + 1e-9
    if sigma > 1e-6:
        d = b - b[-1] if kernel == "value" else np.arange(len(b))[::-1]
        w = np.exp(-(d**2) / (2 * sigma**2))
        # Standard deviations near zero magnify the last bit of the variance.
        assert got == pytest.approx((w * b).sum() / w.sum(), rel=1e-6, abs=1e-9)


def test_filter_by_hand() -> None:
    # Values 0 and 2: mean 1, population std 1; weight of the older one exp(-4 / 2) or exp(-1 / 2).
    weight = math.exp(-2)
    assert gaussian_filter([0.0, 2.0], 10, "value") == pytest.approx(2 / (1 + weight), rel=1e-15)
    weight = math.exp(-0.5)
    assert gaussian_filter([0.0, 2.0], 10, "time") == pytest.approx(2 / (1 + weight), rel=1e-15)
    # Values 0 and 40: std 20 is cut to m / 2 = 5.
    weight = math.exp(-(40**2) / 50)
    assert gaussian_filter([0.0, 40.0], 10, "value") == pytest.approx(40 / (1 + weight), rel=1e-15)


@pytest.mark.parametrize("kernel", ["value", "time"])
def test_equal_values_are_their_own_mean(kernel: str) -> None:
    assert gaussian_filter([91.25] * 10, 10, kernel) == 91.25


def judged(detector: SaturationDetector, angles: list[float]) -> list[Verdict]:
    """Return the verdict on each angle."""
    verdicts, seen = [], Seen()
    for angle in angles:
        verdict, seen = detector.judge(seen, angle)
        verdicts.append(verdict)
    return verdicts


def test_saturation_needs_two_smoothed_values() -> None:
    detector = SaturationDetector(0.1, buffer_size=3, min_samples=3, kernel="value")
    verdicts = judged(detector, [90.0] * 8)
    assert [v.saturated for v in verdicts] == [False, False, False, True] * 2
    assert [v.smoothed for v in verdicts] == [None, None, 90.0, 90.0] * 2
    assert [v.rise for v in verdicts] == [None, None, None, 0.0] * 2


def test_rise_is_signed() -> None:
    """A falling angle counts as saturated, as printed."""
    detector = SaturationDetector(0.1, buffer_size=1, min_samples=1, kernel="value")
    assert [v.saturated for v in judged(detector, [100.0, 80.0])] == [False, True]


def test_threshold_itself_is_not_below_it() -> None:
    detector = SaturationDetector(0.5, buffer_size=1, min_samples=1, kernel="value")
    assert [v.saturated for v in judged(detector, [90.0, 90.5, 90.75])] == [False, False, True]


@given(
    st.lists(st.floats(60, 120) | st.none(), min_size=30, max_size=80),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from(["value", "time"]),
)
def test_decisions_match_the_independent_implementation(
    angle_list: list[float | None], m: int, least: int, kernel: str
) -> None:
    detector = SaturationDetector(0.1, m, least, kernel)
    smoothed, lrs = [], []
    lr, seen = 1.0, Seen()
    for angle in angle_list:
        if angle is None:
            smoothed.append(None)
        else:
            verdict, seen = detector.judge(seen, angle)
            smoothed.append(verdict.smoothed)
            if verdict.saturated:
                lr *= 0.5
        lrs.append(lr)
    wanted, wanted_lrs = independent.schedule(
        angle_list, 1.0, rho=0.5, m=m, least=least, time_kernel=kernel == "time"
    )
    for got, value in zip(smoothed, wanted, strict=True):
        assert (got is None) == (value is None)
        assert got is None or got == pytest.approx(value, rel=1e-6)
    # A rise within rounding of the threshold may fall to either side; such lists are rare.
    rises = [
        b - a for a, b in zip(wanted, wanted[1:], strict=False) if a is not None and b is not None
    ]
    if all(abs(rise - 0.1) > 1e-6 for rise in rises):
        assert lrs == wanted_lrs
