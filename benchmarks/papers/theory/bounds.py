"""Convergence bounds for discrete drops (UAI 2024, Theorems 5.1, 5.2; 2021, Theorems 2, 3).

For convex ``f`` and :class:`~papers.theory.UnifiedMomentum` all three bound
``min_{t < T} E f(x_t) - f(x*)``. Errors in the papers, besides those named at the functions:

- the assumption on the noise is printed as ``E|G - E G| <= delta^2``; the proof uses the squared
  norm;
- the sum by parts before (31) runs over ``x_{t_i - 1}``, printed ``x_{t_i}``, and each term is
  bounded by ``f(x_0) - f(x*)``, which does not follow: noise may raise ``E f``. (31) holds all the
  same: with rates that never rise the whole sum is at most ``alpha_0 (f(x_0) - f(x*))``, one term
  of the printed ``sum_i alpha_i (f(x_0) - f(x*))``;
- the exponents -1/3 and -2/3 above (32) belong to the other sequence of rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from autodrop_ext.checks import at_least_zero, count, number

from .momentum import fraction

Sums = Literal["printed", "exact"]


@dataclass(frozen=True)
class Problem:
    """The constants that all bounds share.

    Args:
        excess: ``f(x_0) - f(x*)``.
        distance: ``|x_0 - x*|``.
        gradient: ``G``, bound on the length of the gradient of ``f``.
        noise: ``delta``, bound on the standard deviation of the stochastic gradient.
        momentum: ``beta``, in [0, 1).
        s: 0 heavy ball, 1 Nesterov, ``1 / (1 - beta)`` gradient descent.

    Raises:
        TypeError, ValueError: an argument is wrong; the message gives it, what was expected and
            what came.
    """

    excess: float
    distance: float
    gradient: float
    noise: float
    momentum: float = 0.0
    s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("excess", "distance", "gradient", "noise", "s"):
            at_least_zero(name, getattr(self, name))
        fraction("momentum", self.momentum)

    def bound(self, rates: float, iterations: float, squares: float) -> float:
        """Inequality (31) from its three sums.

        Args:
            rates: ``sum_i alpha_i`` over the drops.
            iterations: ``sum_t alpha_t`` over the iterations.
            squares: ``sum_t alpha_t alpha_{t-1}``.
        """
        for name, value in (("rates", rates), ("squares", squares)):
            at_least_zero(name, value)
        number("iterations", iterations)
        keep = 1 - self.momentum
        start = keep * self.distance**2 / 2
        descent = self.momentum * self.excess * rates / keep
        scatter = (2 * self.s * self.momentum + 1) * (self.gradient**2 + self.noise**2)
        return (start + descent + scatter * squares / (2 * keep)) / iterations


def schedule_bound(problem: Problem, rates: Sequence[float], gaps: Sequence[int]) -> float:
    """Inequality (31) for any non-increasing rates, each held for its number of iterations.

    ``alpha_{-1}`` of the first product is taken as ``alpha_0``; the velocity starts at zero, so
    that no earlier rate exists.

    Args:
        problem: constants.
        rates: ``alpha_0 >= alpha_1 >= ...``, all in (0, 1].
        gaps: ``k_i``, iterations at each rate, at least 1; integers of numpy are taken too.

    Raises:
        ValueError: lengths differ, rates rise or leave (0, 1], or a gap is below 1.
    """
    if len(rates) == 0 or len(rates) != len(gaps):
        raise ValueError(
            f"gaps: expected one per rate and at least one, got {len(gaps)} for {len(rates)} rates"
        )
    # As Python's numbers: a product in numpy's int32 or float32 would wrap or round.
    whole = [count(f"gaps[{i}]", gap, 1) for i, gap in enumerate(gaps)]
    alphas = [
        number(f"rates[{i}]", rate, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
        for i, rate in enumerate(rates)
    ]
    before = alphas[0]
    squares = 0.0
    for i, (rate, gap) in enumerate(zip(alphas, whole, strict=True)):
        if rate > before:
            raise ValueError(f"rates[{i}]: expected at most the one before, {before}, got {rate}")
        squares += rate * before + (gap - 1) * rate**2
        before = rate
    total = math.fsum(gap * rate for rate, gap in zip(alphas, whole, strict=True))
    return problem.bound(math.fsum(alphas), total, squares)


def bound_after_drops(
    problem: Problem, n: int, kappa1: float, kappa2: float, *, sums: Sums = "exact"
) -> float:
    """Theorem 5.1 after ``n`` rates; its value is in the 2021 paper's Theorem 2 and in (40).

    UAI 2024 states only ``O(log n / sqrt(n))``; the proof gives ``O(log n / n)``.

    "exact", the default, takes the sums (32) and (34) themselves, ``H_{n+1} - 1`` and ``H_n`` with
    ``H`` the harmonic numbers. "printed" takes ``log(n + 1) - log 2`` and ``log n`` for them, as
    the papers do: those integrals are below the sums that they are to bound (both are 0 at
    ``n = 1``), so that what "printed" returns is no bound.

    Args:
        problem: constants.
        n: number of rates; they satisfy (10), such as ``(i + 2)^(-1)``.
        kappa1: ``k_i alpha_i >= kappa1``.
        kappa2: ``k_i alpha_i alpha_{i-1} <= kappa2 / (i + 1)``.
        sums: "exact" or "printed".
    """
    count("n", n, 1)
    _check_constants(kappa1, kappa2)
    if sums == "printed":
        rates, squares = math.log(n + 1) - math.log(2), math.log(n)
    elif sums == "exact":
        harmonic = math.fsum(1 / i for i in range(1, n + 1))
        rates, squares = harmonic + 1 / (n + 1) - 1, harmonic
    else:
        raise ValueError(f"sums: expected 'printed' or 'exact', got {sums!r}")
    return problem.bound(rates, kappa1 * n, kappa2 * squares)


def bound_after_iterations(
    problem: Problem, iterations: int, kappa1: float, kappa2: float
) -> float:
    """Theorem 5.2 after ``T`` iterations of Algorithm 2: ``O(log T / sqrt(T))``, (12) of 2021.

    :func:`bound_after_drops` with ``sums="printed"``, and ``n`` replaced by its upper bound of (41)
    inside the logarithms and by its lower bound in the denominators.

    Raises:
        ValueError: ``T <= 9 kappa2 / 2``, where the lower bound on ``n`` is not positive; the
            papers do not state this condition.
    """
    count("iterations", iterations, 1)
    _check_constants(kappa1, kappa2)
    least = math.sqrt(2 * iterations / kappa2) - 3
    if least <= 0:
        raise ValueError(
            f"iterations: expected more than 9 kappa2 / 2 = {4.5 * kappa2:g}, got {iterations}"
        )
    most = math.sqrt(2 * iterations / kappa1)
    rates = math.log(most + 1) - math.log(2)
    return problem.bound(max(0.0, rates), kappa1 * least, kappa2 * max(0.0, math.log(most)))


def _check_constants(kappa1: float, kappa2: float) -> None:
    number("kappa1", kappa1)
    number("kappa2", kappa2)
