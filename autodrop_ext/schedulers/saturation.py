"""When has the angular velocity saturated? UAI 2024, Algorithm 1, lines 8 to 13."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kernel = Literal["value", "time"]


def gaussian_filter(values: Sequence[float], buffer_size: int, kernel: Kernel) -> float:
    """Smoothed value at the newest of ``values`` (UAI 2024, section 4, the filter ``Gau``).

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
        Degrees. The newest value itself where all values are equal.
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


class SaturationDetector:
    """Smooths angles and says when their rise has ended.

    Smoothing starts at ``min_samples`` angles since the last saturation and runs over the last
    ``buffer_size`` of them. Saturation needs two smoothed values since the last one, and is
    reported where the newer exceeds the older by less than ``threshold``. The difference is signed,
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

    def __init__(
        self, threshold: float, buffer_size: int, min_samples: int, kernel: Kernel
    ) -> None:
        self.threshold = threshold
        self.buffer_size = buffer_size
        self.min_samples = min_samples
        self.kernel = kernel
        self.reset()

    def fresh(self) -> SaturationDetector:
        """Another one with the same settings that has seen nothing."""
        return SaturationDetector(self.threshold, self.buffer_size, self.min_samples, self.kernel)

    def reset(self) -> None:
        """Forget all angles."""
        self._buffer: list[float] = []
        self._samples = 0
        self._smoothed: float | None = None

    def leave(self, angle: float, tolerance: float) -> None:
        """Forget all angles if the next one falls by more than errors and their spread explain.

        For angles that are measured in another way from now on: the fall is none of the motion's.
        Fewer than three angles have no spread to speak of, and decide nothing soon.

        Args:
            angle: the next one, degrees.
            tolerance: degrees; NaN where nothing is known of the errors.
        """
        if len(self._buffer) < 3:
            return
        least, most = min(self._buffer), max(self._buffer)
        if not angle + tolerance >= least - (most - least):
            self.reset()

    def update(self, angle: float) -> Verdict:
        """Take the next angle, in degrees."""
        self._buffer.append(angle)
        del self._buffer[: -self.buffer_size]
        self._samples += 1
        if self._samples < self.min_samples:
            return Verdict()
        smoothed = gaussian_filter(self._buffer, self.buffer_size, self.kernel)
        if self._smoothed is None:
            self._smoothed = smoothed
            return Verdict(smoothed)
        rise = smoothed - self._smoothed
        self._smoothed = smoothed
        saturated = rise < self.threshold
        if saturated:
            self.reset()
        return Verdict(smoothed, rise, saturated)

    def state_dict(self) -> dict[str, Any]:
        return {
            "buffer": list(self._buffer),
            "samples": self._samples,
            "smoothed": self._smoothed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._buffer = list(state["buffer"])
        self._samples = state["samples"]
        self._smoothed = state["smoothed"]
