"""What is true: angles in 80-bit floats from every iterate, and how many attacks to run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LARGE = os.environ.get("AUTODROP_ATTACKS", "0") not in ("", "0")
"""Whether the attacks run in large, as ``.ci/run`` does: ``AUTODROP_ATTACKS=1``."""


def count(small: int, large: int) -> int:
    """How many cases to run: a small number by default, a large one under AUTODROP_ATTACKS=1."""
    return large if LARGE else small


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    """All elements as one vector of 80-bit floats; complex numbers as pairs."""
    parts = [np.zeros(0, np.longdouble)]
    for tensor in tensors:
        x = tensor.detach()
        x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        parts.append(x.reshape(-1).double().numpy().astype(np.longdouble))
    return np.concatenate(parts)


class Truth(NamedTuple):
    """An angle, and how far float64 arithmetic may be from it.

    Attributes:
        angle: degrees.
        rounding: degrees. What float64 sums of a window, their difference and an arc cosine lose.
    """

    angle: float
    rounding: float


def angle(first: np.ndarray, second: np.ndarray) -> float | None:
    """Degrees between two vectors, exact near 0 and 180 too; None where one is zero."""
    lengths = [np.sqrt((v * v).sum()) for v in (first, second)]
    if not all(np.isfinite(length) and length > 0 for length in lengths):
        return None
    u, v = first / lengths[0], second / lengths[1]
    apart, together = u - v, u + v
    return float(
        np.degrees(2 * np.arctan2(np.sqrt((apart**2).sum()), np.sqrt((together**2).sum())))
    )


class Witness:
    """Keeps every iterate that a meter should have seen.

    Args:
        watched: returns the tensors that are watched now, distinct ones.
    """

    def __init__(self, watched: Callable[[], Sequence[Tensor]]) -> None:
        self._watched = watched
        self.seen: list[tuple[tuple[int, ...], np.ndarray]] = []

    def see(self) -> None:
        """Take the parameters as they are now; call right before the meter does."""
        tensors = self._watched()
        self.seen.append((tuple(map(id, tensors)), flat(tensors)))

    def angle(self, window: int, without: Sequence[int] = ()) -> Truth | None:
        """True angle of the last three windows; None where there are not three of one kind.

        Args:
            without: indices of iterates that the meter did not take.
        """
        taken = [seen for i, seen in enumerate(self.seen) if i not in without]
        last = taken[-3 * window :]
        if len(last) < 3 * window or len({who for who, _ in last}) > 1:
            return None
        means = [
            np.stack([x for _, x in last[i * window : (i + 1) * window]]).sum(axis=0) / window
            for i in range(3)
        ]
        s, before = means[2] - means[1], means[1] - means[0]
        true = angle(s, before)
        return None if true is None else Truth(true, _rounding(window, means, (s, before), true))


def _rounding(
    window: int, means: Sequence[np.ndarray], displacements: Sequence[np.ndarray], true: float
) -> float:
    """Degrees. Each addition, the division and the difference round to 2^-53 of the mean."""
    unit = 2.0**-53
    longest = max(float(np.sqrt((m * m).sum())) for m in means)
    shortest = min(float(np.sqrt((s * s).sum())) for s in displacements)
    turned = 2 * (window + 3) * unit * longest / shortest
    # The cosine has some units of its own, which the arc cosine stretches near 0 and 180 degrees.
    lost = 8 * unit
    steep = lost / max(math.sin(math.radians(true)), math.sqrt(lost))
    return math.degrees(turned + 2 * steep)


SIGMAS = 5.0
"""Standard errors of a hashed table that are allowed: one angle in a million has more."""


def allowed(reading: Any, truth: Truth) -> float:
    """Degrees that a reading may be away from the truth."""
    return truth.rounding + SIGMAS * float(reading.standard_error)


def is_right(reading: Any, truth: Truth | None) -> bool:
    """Whether a reading's angle is within the error that it reports; no angle is never wrong."""
    if reading.angle is None:
        return True
    return truth is not None and abs(reading.angle - truth.angle) <= allowed(reading, truth)
