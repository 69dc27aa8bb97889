"""Cooldown: a fall of all rates to their lower bounds, whatever is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from .. import checks
from ..saved import Form, list_of

Shape = Literal["linear", "sqrt", "cosine"]
check_shape = checks.choice("linear", "sqrt", "cosine")


class Cooldown(NamedTuple):
    """A fall of all rates to their lower bounds.

    Attributes:
        begin: steps before it.
        num_steps: steps that it takes.
        shape: form of the fall.
        lrs: rates at its begin.
    """

    begin: int
    num_steps: int
    shape: Shape
    lrs: Sequence[float]

    def lrs_at(self, step: int, floor: Callable[[int], float]) -> list[float]:
        """Return the rates after a step."""
        left = self._left(step)
        lows = [min(floor(g), lr) for g, lr in enumerate(self.lrs)]
        return [low + (lr - low) * left for low, lr in zip(lows, self.lrs, strict=True)]

    def _left(self, step: int) -> float:
        done = min(1.0, (step - self.begin) / self.num_steps)
        return {
            "linear": 1.0 - done,
            "sqrt": 1.0 - math.sqrt(done),
            "cosine": (1.0 + math.cos(math.pi * done)) / 2,
        }[self.shape]

    def joined(self, step: int, lrs: Sequence[float]) -> Cooldown:
        """Return the cooldown with groups that were added since; they fall to 0 by its end.

        Args:
            step: optimizer steps so far, the first one of these groups included.
            lrs: rates of all groups.
        """
        left = self._left(step - 1) or 1.0
        added = [lr / left for lr in lrs[len(self.lrs) :]]
        return self._replace(lrs=[*self.lrs, *added])

    @staticmethod
    def saved(cooldown: Cooldown | None) -> dict[str, Any]:
        """Return plain values, with the same entries if there is no cooldown."""
        cooldown = Cooldown(0, 0, "linear", []) if cooldown is None else cooldown
        return {**cooldown._asdict(), "lrs": list(cooldown.lrs)}


COOLDOWN_FORM: Form = {
    "begin": checks.at_least(0),
    "num_steps": checks.at_least(0),
    "shape": check_shape,
    "lrs": list_of(checks.at_least_zero),
}
"""Form of a cooldown in a saved state."""
