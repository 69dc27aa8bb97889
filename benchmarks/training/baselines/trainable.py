"""The trainable learning rate (TLR): Retsinas, Sfikas, Filntisis, Maragos, 2022.

The UAI paper describes it as a second-order hypergradient method without further settings than
the gap ``p`` between two changes of the rate (0.33 epochs) and a bound ``c`` (1/4), sections 2 and
6.1. Over one gap the parameters move by ``-lr u``. As a function of the rate, the loss along the
*last* gap's ``u'`` has the slope ``-<u', u'>`` where that gap began and ``-<u', u>`` where it
ended, so that Newton's step from there is, relative to the rate,

    r = <u', u> / (<u', u'> - <u', u>).

On a quadratic of one dimension it lands at the best rate at once. We take the bound as one on the
relative change, ``lr *= 1 + clip(r, -c, c)``, and where the curvature is not positive, so that
Newton's step means nothing, go by ``c`` in the direction of descent. A later public version by the
same authors *damps* the step by 1/4 instead; with noisy ``u`` that lets a rate change its sign.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class TrainableLearningRate:
    """Changes the learning rates of an optimizer by Newton's method, once in ``gap`` steps.

    All param groups get the same relative change; ``u`` divides each group's movement by its rate.

    Args:
        optimizer: any.
        gap: optimizer steps between two changes; the reference recommends a third of an epoch.
        bound: ``c``, in (0, 1).
    """

    def __init__(self, optimizer: Optimizer, gap: int, *, bound: float = 0.25) -> None:
        if gap < 1:
            raise ValueError(f"gap: expected a number of steps, at least 1, got {gap!r}")
        if not 0 < bound < 1:
            raise ValueError(f"bound: expected a number between 0 and 1, got {bound!r}")
        self.optimizer = optimizer
        self.gap = gap
        self.bound = bound
        self.steps = 0
        self._point = [p.detach().clone() for p in self._params()]
        self._last: list[Tensor] | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Measure from here on, as after a warm-up, whose steps had other rates."""
        for p, point in zip(self._params(), self._point, strict=True):
            point.copy_(p)
        self.steps, self._last = 0, None

    @torch.no_grad()
    def step(self) -> None:
        """Call after every ``optimizer.step()``."""
        self.steps += 1
        if self.steps % self.gap:
            return
        direction = []
        for p, point, lr in zip(self._params(), self._point, self._lrs(), strict=True):
            direction.append((point - p) / lr)
            point.copy_(p)
        if self._last is not None:
            along = _dot(direction, self._last)
            factor = 1 + self._relative_step(along, _dot(self._last, self._last) - along)
            for group in self.optimizer.param_groups:
                group["lr"] *= factor
        self._last = direction

    def _relative_step(self, along: float, curvature: float) -> float:
        if not (math.isfinite(along) and math.isfinite(curvature)):
            return 0.0
        if curvature > 0:
            return max(-self.bound, min(self.bound, along / curvature))
        return math.copysign(self.bound, along) if along else 0.0

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _lrs(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups for _ in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; the rates belong to the optimizer's state."""
        return {
            "steps": self.steps,
            "point": [t.clone() for t in self._point],
            "last": None if self._last is None else [t.clone() for t in self._last],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.steps = state["steps"]
        for point, saved in zip(self._point, state["point"], strict=True):
            point.copy_(saved)
        last = state["last"]
        self._last = (
            None
            if last is None
            else [s.to(t, copy=True) for t, s in zip(self._point, last, strict=True)]
        )


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum())
