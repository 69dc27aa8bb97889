"""``sample="auto"``: the smallest part of the parameters that is precise enough."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from .draw import LEAST_CHUNKS, Choice
from .error import FloatArray, standard_error, variances

logger = logging.getLogger("autodrop_ext")

FRACTIONS = tuple(2.0**-j for j in range(14, -1, -1))
"""What is chosen from: halves, quarters and so on down to 1/16,384, ascending."""

PILOT_FRACTION = 1 / 64
"""What is read at first, 0.2 bytes a parameter: it stays in memory while the chosen fraction, which
may be everything, gathers its first windows."""

PILOT_READINGS = 3
"""Readings before the choice. The worst of them counts, because angles and their scatter vary from
window to window."""


class AutoFraction:
    """Chooses a fraction once, from the scatter that the first readings show.

    Args:
        tolerance: standard error of the angle that is asked for, degrees.

    Attributes:
        chosen: the fraction, or None while it is not known.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.chosen: float | None = None
        self._least = FRACTIONS[0]
        self.restart()

    def restart(self, *, anew: bool = False) -> None:
        """Forget the readings so far, and with ``anew`` the choice."""
        if anew:
            self.chosen = None
        self._worst = [0.0] * len(FRACTIONS)
        self._readings = 0

    def start(self, elements: float | None) -> float:
        """The fraction to begin with.

        If all elements moved independently, an angle of 90 degrees over a part ``f`` of ``n``
        elements would have the standard error ``sqrt((1 - f) / (f n))`` radians. Neighbours depend
        on each other, so that real models need more. Where even this asks for everything, there is
        nothing to try out; otherwise it begins with 1/64, or less if less might do.

        Args:
            elements: of the model; None where ranks could come to different numbers.
        """
        if self.chosen is not None:
            return self.chosen
        self._least = self.first(elements)
        if self._least == 1:
            self._choose(1.0, f"because there are only {elements:,.0f}")
        return self._least

    def first(self, elements: float | None) -> float:
        """What :meth:`start` begins with, if nothing is chosen."""
        if not elements:
            return PILOT_FRACTION
        enough = 1 / (1 + math.radians(self.tolerance) ** 2 * elements)
        fraction = next(f for f in FRACTIONS if f >= enough)
        return min(fraction, PILOT_FRACTION) if fraction < 1 else 1.0

    def take(self, sums: Sequence[float], moments: Sequence[Sequence[float]]) -> float | None:
        """Look at a reading; the choice if this was the last one needed.

        Args:
            sums: dot, norm and previous norm, over all ranks.
            moments: covariances of the three under each of :data:`FRACTIONS`, over all ranks.
        """
        errors = [standard_error(sums[0], sums[1], sums[2], m) for m in moments]
        if self.chosen is not None or any(map(math.isnan, errors)):
            return None
        self._worst = list(map(max, self._worst, errors))
        self._readings += 1
        if self._readings < PILOT_READINGS:
            return None
        fraction, error = next(
            (f, e)
            for f, e in zip(FRACTIONS, self._worst, strict=True)
            if e <= self.tolerance and f >= self._least
        )
        self._choose(fraction, f"for a standard error of {error:.2g} degrees")
        return fraction

    def _choose(self, fraction: float, why: str) -> None:
        self.chosen = fraction
        # Everything was asked for by nobody: it costs 12 bytes a parameter.
        level = logging.WARNING if fraction == 1 else logging.INFO
        part = "all parameters are read" if fraction == 1 else f"a fraction of {fraction:g} is read"
        logger.log(level, "sample='auto': %s, %s (at most %g)", part, why, self.tolerance)


def foreseen(
    scattered: FloatArray, choice: Choice, fraction: float, weights: FloatArray
) -> FloatArray:
    """Covariances of the sums under each of :data:`FRACTIONS`, ``[num_fractions, 6]``.

    Every stratum's part is taken to grow alike. A real choice of more chunks has finer strata too,
    and so a smaller error.

    Args:
        scattered: of the strata as they are read now, ``[num_strata, 6]``.
        choice: the strata.
        fraction: that is read now.
        weights: of their sums, ``[num_strata]``.
    """
    tables = []
    # At least two chunks a *tensor*: of a part smaller than now, strata would be wider ones.
    of_tensor = np.bincount(choice.stratum_tensor, choice.taken)[choice.stratum_tensor]
    least = np.minimum(choice.population, LEAST_CHUNKS * choice.taken / of_tensor)
    for other in FRACTIONS:
        grown = choice.taken * (other / fraction) if other < 1 else choice.population
        taken = np.clip(grown, least, choice.population)
        tables.append(variances(scattered, choice.population, taken).T @ weights)
    return np.array(tables)
