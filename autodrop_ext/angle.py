"""From four sums to an angle, and how far float32 sums may move it.

A window's mean carries the roundings of ``k`` additions. Where steps are tiny they repeat from step
to step and add up, so that the error of a mean ``m`` has the variance

    sigma^2 = 2^-46 (0.05 + 0.015 k + 0.003 k^2) |y|^2

over all elements together, where ``y`` is what was summed: the parameters in sum form (``y = m``),
their distance from the last mean in delta form (``y = s``). The linear term is that of independent
roundings, the quadratic one covers their repetition (fitted to simulations over k = 16 to 1000 and
relative updates of 1e-3 to 1e-7). The constant is the conversion of float64 parameters: 0.045 for
one rounding, which is the same in all snapshots of a window where steps are tiny.

The errors ``e_i`` of two neighbouring means enter ``s_i = m_i - m_{i-1}`` with opposite signs, so
that the expected sums are ``|s_i|^2 + sigma_i^2 + sigma_{i-1}^2`` and
``<s_i, s_{i-1}> - sigma_{i-1}^2``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from .ops.interface import Form, Sums

FLOOR = 1e-6
"""Degrees. Near 0 and 180 degrees the arc cosine turns the last bit of a float64 into 8.5e-7."""

CONVERT_TO_DELTA = 0.01  # degrees of rounding error in sum form
CONVERT_TO_SUM = 0.005  # half of it, so that the form does not swing from window to window

LEAST_MOVERS = 2.0
"""Effective movers that a sample must be expected to hold of the motion that wanders."""

FREEDOM_A_MOVER = 0.7
"""Degrees of freedom of the 95 % interval that an effective mover is worth, at most. Where a sample
happens to miss the largest movers, the rest are alike and seem to leave more."""

MOST_VARIANCE = 0.125
"""Largest relative variance of the norm from wandering. The standard error of the angle linearises
a ratio of norms, which means little once these are known to no better than 35 %."""

SMALL_VARIANCE = 1e-3
"""Relative variance below which wandering matters in proportion less: each effective mover counts
for ``SMALL_VARIANCE / variance`` of them. It moves the norm by 3 %, an angle by some tenths of a
degree. All models have some whose chunks differ a little from window to window: the transformer of
``docs/scaling.md`` has 1e-4 with AdamW.

These four were chosen after looking at the results of ``benchmarks/accuracy/sampling.py``, of
``sparse`` and ``accuracy``; ``docs/scaling.md`` has the tables."""

PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
"""Order of the six covariances of dot, norm and previous norm."""

_SPREAD = 4.0
"""Standard deviations of the zero-mean part that the bound covers. Of 5,000 angles of random cases
three were beyond three."""


def angle_of(dot: float, norm: float, previous_norm: float) -> tuple[float, float] | None:
    """Angle in degrees and cosine from ``<s, s'>``, ``|s|^2`` and ``|s'|^2``.

    Computed without the papers' epsilon, which would pull short displacements to 90 degrees.
    None where a norm is zero or anything is not finite.
    """
    if not (math.isfinite(dot) and 0 < norm < math.inf and 0 < previous_norm < math.inf):
        return None
    cosine = max(-1.0, min(1.0, dot / (math.sqrt(norm) * math.sqrt(previous_norm))))
    return math.degrees(math.acos(cosine)), cosine


def mean_variance(window: int, sums: Sums, form: str, elements: float) -> float:
    """``sigma^2`` of the mean of a window.

    Args:
        window: ``k``, snapshots that were summed.
        sums: totals of the window.
        form: form that they were summed in, "sum" or "delta".
        elements: how many elements the sums run over.
    """
    additions = 2.0**-46 * (0.05 + 0.015 * window + 0.003 * window**2)
    # Below float32's normal numbers errors no longer shrink with the values. Units are 2^-149, and
    # 2^-141 for a displacement without its low byte; a rounding has a twelfth of the unit's square.
    if form == "sum":
        return additions * sums.mean_norm + elements * 2.0**-298 / 12
    # The residual of the mean is kept to |m| 2^-32, the displacement to 16 bits of its mantissa.
    tiny = elements * (2.0**-298 + 2.0**-282 / window**2) / 12
    return (additions + 2.0**-34) * sums.norm + 2.0**-65 * sums.mean_norm + tiny


def angle_error(sums: Sums, variances: tuple[float, float, float], elements: float) -> float:
    """Bound in degrees on the error of the angle of ``sums``.

    Args:
        sums: totals of the window.
        variances: of the means ``m_{i-2}``, ``m_{i-1}``, ``m_i``.
        elements: how many elements carry the motion (Kish); the zero-mean part of the error
            averages out with their square root.
    """
    measured = angle_of(sums.dot, sums.norm, sums.previous_norm)
    if measured is None:
        return 180.0
    # With few elements the squared error may be many times its mean.
    worst = _upper(elements)
    oldest, shared, newest = (worst * variance for variance in variances)
    norm = sums.norm - newest - shared
    previous_norm = sums.previous_norm - shared - oldest
    corrected = angle_of(sums.dot + shared, norm, previous_norm)
    if corrected is None or abs(sums.dot + shared) > math.sqrt(norm * previous_norm):
        return 180.0
    bias = abs(corrected[0] - measured[0])
    relative = (newest + shared) / norm + (shared + oldest) / previous_norm
    spread = math.degrees(math.sqrt(relative / max(elements, 1)))
    return min(180.0, FLOOR + bias + _SPREAD * spread)


def _upper(elements: float) -> float:
    """How many times its mean a squared error of so many elements may be.

    The upper quantile of chi-square at :data:`_SPREAD` standard deviations over its mean (Wilson
    and Hilferty): 9.7 for one element, 1.04 for ten thousand.
    """
    spread = 2 / (9 * max(elements, 1.0))
    return (1 - spread + _SPREAD * math.sqrt(spread)) ** 3


def better_form(
    form: Form,
    window: int,
    sums: Sums,
    rounding_error: float,
    elements: float,
    effective_elements: float,
) -> Form:
    """The form that resolves the next windows at the least cost.

    Args:
        form: that gave ``sums``.
        window: ``k``.
        sums: totals of the window.
        rounding_error: of its angle, degrees.
        elements: as in :func:`mean_variance`.
        effective_elements: as in :func:`angle_error`.
    """
    if form == "sum":
        return "delta" if rounding_error > CONVERT_TO_DELTA else "sum"
    in_sum_form = mean_variance(window, sums, "sum", elements)
    error = angle_error(sums, (in_sum_form, in_sum_form, in_sum_form), effective_elements)
    return "sum" if error < CONVERT_TO_SUM else "delta"


def gradient(dot: float, norm: float, previous_norm: float) -> list[float]:
    """Weights of the six covariances in the variance of the cosine (delta method)."""
    length = math.sqrt(norm) * math.sqrt(previous_norm)
    cosine = dot / length
    g = (1 / length, -cosine / (2 * norm), -cosine / (2 * previous_norm))
    return [(1 if i == j else 2) * g[i] * g[j] for i, j in PAIRS]


def standard_error(
    dot: float, norm: float, previous_norm: float, covariances: Sequence[float]
) -> float:
    """Standard error of the angle of three estimates, in degrees; NaN where it is undefined.

    Near 0 and 180 degrees, where the angle is no smooth function of the cosine, it is half the
    width of what the cosine's standard error covers.

    Args:
        dot: ``D``, an estimate like the two others.
        norm: ``A``.
        previous_norm: ``B``.
        covariances: their covariances, six.
    """
    if not (math.isfinite(dot) and 0 < norm < math.inf and 0 < previous_norm < math.inf):
        return math.nan
    if not all(map(math.isfinite, covariances)):
        return math.nan
    cosine = dot / (math.sqrt(norm) * math.sqrt(previous_norm))
    direction = gradient(dot, norm, previous_norm)
    error = math.sqrt(max(math.fsum(map(operator.mul, direction, covariances)), 0.0))
    low, high = (max(-1.0, min(1.0, cosine + sign * error)) for sign in (-1, 1))
    return math.degrees(math.acos(low) - math.acos(high)) / 2


class Precision:
    """The form that sums are held in, and how far rounding may have moved the newest means.

    Args:
        fixed: form to hold in any case; None to choose.

    Attributes:
        form: form of the sums now.
        variances: of the means before and at the last close.
    """

    def __init__(self, fixed: Form | None) -> None:
        self.fixed = fixed
        self.form: Form = fixed or "delta"
        self.variances = (0.0, 0.0)

    def start_over(self) -> None:
        """There are no means any more."""
        self.variances = (0.0, 0.0)

    def begin(self) -> Form:
        """The form to begin with."""
        self.form = self.fixed or "delta"
        return self.form

    def close(self, k: int, sums: Sums, elements: float, effective_elements: float) -> float:
        """Bound in degrees on the error of the angle of a window that was closed.

        Args:
            k: snapshots of the window.
            sums: its totals.
            elements: how many elements they run over.
            effective_elements: how many of them carry the motion.
        """
        oldest, shared = self.variances
        newest = mean_variance(k, sums, self.form, elements)
        self.variances = (shared, newest)
        return angle_error(sums, (oldest, shared, newest), effective_elements)

    def choose(
        self,
        k: int,
        sums: Sums,
        rounding_error: float,
        elements: float,
        effective_elements: float,
    ) -> Form | None:
        """The form that the next windows need, if it is another one."""
        if self.fixed is not None:
            return None
        form = better_form(self.form, k, sums, rounding_error, elements, effective_elements)
        if form == self.form:
            return None
        self.form = form
        if form == "sum":
            # Rounding the two sums once is the error of a window of one step.
            rounded = mean_variance(1, sums, "sum", elements)
            before, last = self.variances
            self.variances = (max(before, rounded), max(last, rounded))
        return form

    def merged(self) -> None:
        """The last two means have become one."""
        self.variances = (0.0, max(self.variances))


def movers(numbers: Sequence[float]) -> float | None:
    """Effective movers that the sample is expected to hold of the motion that wanders.

    Infinity where none wanders; None where so few are expected that the scatter of the
    sample does not say how far the angle may be off.

    Args:
        numbers: the last four columns of :meth:`WindowSums.tensor_table`, added up: how many chunks
            are not read, the motion that the survey found, the variance that the norm has because
            motion wanders between chunks, and the sum of squares that its degrees of freedom come
            from. All are 0 where everything is read.
    """
    unread, surveyed, variance, spread = numbers
    if unread == 0:
        return math.inf
    if not surveyed > 0:
        return None
    if variance == 0 or spread == 0:  # the latter by underflow, where next to nothing wanders
        return math.inf
    relative = variance / surveyed**2
    count = variance**2 / spread * max(1.0, SMALL_VARIANCE / relative)
    return count if relative <= MOST_VARIANCE and count >= LEAST_MOVERS else None
