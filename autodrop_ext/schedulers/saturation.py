"""When has the angular velocity saturated? UAI 2024, Algorithm 1, lines 8 to 13."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .. import checks
from ..checks import Check, none_or
from ..saved import list_of

Kernel = Literal["value", "time"]


def gaussian_filter(values: Sequence[float], buffer_size: int, kernel: Kernel) -> float:
    """Return the smoothed value at the newest of ``values`` (UAI 2024, section 4, filter ``Gau``).

    ``sigma = min(std(values), buffer_size / 2)`` with the population standard deviation, and every
    value weighs ``exp(-d^2 / (2 sigma^2))``. The paper prints the distance ``d`` between *values*
    and bounds ``sigma`` as if it were a distance in *time*; both readings are offered. It also
    prints ``x_t`` under the sum where the neighbours' values must stand, because with ``x_t`` the
    filter is the identity; and it centres the buffer on the value that is smoothed, ``m / 2`` on
    each side, where a decision at the newest value can only look back.

    Args:
        values: degrees, oldest first, at least one.
        buffer_size: ``m``.
        kernel: "value": ``d`` is the difference to the newest value, in degrees; "time": the
            distance to it in windows.

    Returns:
        Degrees. The newest value itself if all values are equal.
    """
    newest = values[-1]
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    sigma = min(std, buffer_size / 2)
    if sigma == 0:
        return newest
    weights = []
    for age, value in zip(range(len(values) - 1, -1, -1), values, strict=True):
        distance = value - newest if kernel == "value" else float(age)
        weights.append(math.exp(-((distance / sigma) ** 2) / 2))
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


@dataclass(frozen=True)
class Verdict:
    """What one angle led to: the filter's value, its rise since the last one, saturation or not."""

    smoothed: float | None = None
    rise: float | None = None
    saturated: bool = False


class Seen(NamedTuple):
    """What a detector has seen since the last saturation.

    Attributes:
        buffer: the last angles, at most ``buffer_size`` of them.
        samples: how many angles there have been.
        smoothed: the newest smoothed value, if there is one.
    """

    buffer: tuple[float, ...] = ()
    samples: int = 0
    smoothed: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, which :data:`SEEN` checks."""
        return {**self._asdict(), "buffer": list(self.buffer)}


@dataclass(frozen=True)
class SaturationDetector:
    """Smooths angles and says when their rise has ended.

    Smoothing starts at ``min_samples`` angles since the last saturation and runs over the last
    ``buffer_size`` of them. Saturation needs two smoothed values since the last one, and is
    reported if the newer exceeds the older by less than ``threshold``. The difference is signed,
    so that a fall counts as saturation. The buffer then starts over.

    This is Algorithm 1 of UAI 2024 as far as it can be followed; docs/algorithm.md sets what it
    prints next to what is done here.

    Args:
        threshold: degrees per window.
        buffer_size: ``m``, angles.
        min_samples: angles. With 10 for both, a first value comes from 10 angles and a second one
            from the last 10 of 11, as in Algorithm 1, which never holds more than 10.
        kernel: see :func:`gaussian_filter`.
    """

    threshold: float
    buffer_size: int
    min_samples: int
    kernel: Kernel

    def judge(self, seen: Seen, angle: float) -> tuple[Verdict, Seen]:
        """Return the verdict on the next angle, in degrees, and what has been seen with it."""
        buffer = (*seen.buffer, angle)[-self.buffer_size :]
        samples, last = seen.samples + 1, seen.smoothed
        if samples < self.min_samples:
            return Verdict(), Seen(buffer, samples, last)
        smoothed = gaussian_filter(buffer, self.buffer_size, self.kernel)
        seen = Seen(buffer, samples, smoothed)
        if last is None:
            return Verdict(smoothed), seen
        rise = smoothed - last
        saturated = rise < self.threshold
        return Verdict(smoothed, rise, saturated), Seen() if saturated else seen

    def check_seen(self, state: Mapping[str, Any], name: str) -> Seen:
        """Return what a state of the form :data:`SEEN` holds, called ``name`` in messages.

        Raises:
            ValueError: there are more angles than this detector keeps.
        """
        buffer, samples, smoothed = state["buffer"], state["samples"], state["smoothed"]
        if len(buffer) > min(self.buffer_size, samples):
            raise ValueError(
                f"{name}['buffer']: expected at most buffer_size={self.buffer_size} and "
                f"samples={samples} angles, got {len(buffer)}"
            )
        return Seen(tuple(buffer), samples, smoothed)


def _check_angle(name: str, value: Any) -> float:
    return checks.number(name, value, "a number from 0 to 180", lambda x: 0 <= x <= 180)


SEEN: Mapping[str, Check] = {
    "buffer": list_of(_check_angle),
    "samples": checks.at_least(0),
    "smoothed": none_or(_check_angle),
}
"""Form of what a detector has seen, in a saved state."""
