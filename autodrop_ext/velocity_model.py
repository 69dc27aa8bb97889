"""The angular velocity model of UAI 2024, Section 5.2 (2021, Section 5.2).

It is in radians and iterations: velocities in radians, derivatives and thresholds in radians per
iteration. Everything else in this package uses degrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor

from . import checks
from .checks import number

RateSequence = Literal["theorem", "proof"]
"""Theorem 5.2's ``(i + 1)^(-2/3)``, or ``(i + 2)^(-1)`` of its proof."""

_Time = TypeVar("_Time", float, Tensor)

# From here on float64 does not tell all integers apart, and a closed form is all there is.
_EXACT_INTEGERS = 2.0**52


@dataclass(frozen=True)
class VelocityModel:
    """``v_lr(t)``, equation (12) of UAI 2024 and (10) of 2021, for a constant rate.

    ``v_lr(t) = (pi / 2) (1 + epsilon lr) (1 - 1 / (gamma lr (t + 1 / (gamma lr))))``, printed
    without the inner parentheses; it grows from 0 at ``t = 0`` to ``(pi / 2) (1 + epsilon lr)``.

    Args:
        gamma: Curvature; ``1 / (gamma lr)`` iterations bring the velocity half way up.
        epsilon: How far the limit is above 90 degrees. The papers take it from
            ``(0, 1 / (3 lr))`` for the largest rate, which keeps the limit below 120 degrees; every
            method below raises ValueError for a rate at which it is larger.

    Raises:
        TypeError, ValueError: not finite numbers above 0.
    """

    gamma: float
    epsilon: float

    def __post_init__(self) -> None:
        number("gamma", self.gamma)
        number("epsilon", self.epsilon)

    def velocity(self, t: _Time, lr: float) -> _Time:
        """Return ``v_lr(t)`` in radians, ``t >= 0`` iterations after the rate was last changed."""
        return self.limit(lr) * (1 - 1 / (self.gamma * lr * t + 1))

    def derivative(self, t: _Time, lr: float) -> _Time:
        """Return ``v'_lr(t)`` in radians per iteration, as the proof of Theorem 5.2 begins."""
        curve = self.gamma * lr * t + 1
        return self.limit(lr) * (self.gamma * lr) / curve / curve  # the square could overflow

    def limit(self, lr: float) -> float:
        """Return ``(pi / 2) (1 + epsilon lr)``, radians."""
        number("lr", lr)
        if not self.epsilon * lr < 1 / 3:
            raise ValueError(
                f"epsilon: expected a number below 1 / (3 lr) = {1 / (3 * lr):g}, got "
                f"{self.epsilon!r}; the velocity would settle above 120 degrees"
            )
        return math.pi / 2 * (1 + self.epsilon * lr)

    def threshold(self, lr: float, tau0: float) -> float:
        """Return ``min(tau0, gamma lr / 2)`` of Algorithm 2, radians per iteration."""
        return min(checks.tau0("tau0", tau0), self.gamma * lr / 2)

    def gap_length(self, lr: float, tau0: float) -> float:
        """Return the real ``k`` with ``v'_lr(k)`` at the threshold, in closed form.

        ``k = (gamma lr)^(-1/2) (sqrt(pi (1 + epsilon lr) / (2 tau)) - (gamma lr)^(-1/2))``, as the
        proof of Theorem 5.2 has it, always above 0.
        """
        slope = self.gamma * lr
        return (math.sqrt(self.limit(lr) * slope / self.threshold(lr, tau0)) - 1) / slope

    def drop_gap(self, lr: float, tau0: float) -> int:
        """Return the first integer ``k`` with ``v'_lr(k)`` at or below the threshold, at least 1.

        The proof takes the real :meth:`gap_length` for an integer; Algorithm 2 tests integers. The
        result is the one that a loop over :meth:`derivative` finds, up to gaps of 2^52.
        """
        threshold = self.threshold(lr, tau0)
        gap = max(1, math.ceil(self.gap_length(lr, tau0)))
        if gap < _EXACT_INTEGERS:
            while gap > 1 and self.derivative(float(gap - 1), lr) <= threshold:
                gap -= 1
            while self.derivative(float(gap), lr) > threshold:
                gap += 1
        return gap


def learning_rate(i: int, sequence: RateSequence = "theorem") -> float:
    """Return ``alpha_i`` of Theorem 5.2, ``(i + 1)^(-2/3)``, or of its proof, ``(i + 2)^(-1)``.

    The two contradict each other: the proof applies Theorem 5.1, whose condition
    ``alpha_i <= (i + 2)^(-1)`` the theorem's own sequence breaks at every ``i`` (and its
    ``alpha_{-1}`` is infinite). The papers' bounds hold for the proof's.

    Raises:
        ValueError: ``i`` is negative, or the sequence has no such name.
    """
    checks.count("i", i, 0)
    checks.choice("theorem", "proof")("sequence", sequence)
    return float((i + 1) ** (-2 / 3)) if sequence == "theorem" else 1 / (i + 2)
