"""The reference as a backend: any device, one row of the plan after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .interface import Sums
from .plan import Plan


class ReferenceBackend:
    name = "reference"

    def missing(self, device: torch.device) -> str | None:
        return None

    def bind(self, plan: Plan) -> ReferenceOperations:
        return ReferenceOperations(plan)


class ReferenceOperations:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._rows = list(plan.rows())
        self.per_tensor = torch.zeros(plan.num_rows, 4, dtype=torch.float64, device=plan.device)

    def accumulate(
        self, running: Tensor, mean: Tensor | None, *, first: bool, weight: float = 1.0
    ) -> None:
        self._plan.refresh()
        for x, at in self._rows:
            M = None if mean is None else mean[at]
            reference.accumulate(running[at], x, M, first=first, weight=weight)

    def close_sum(self, running: Tensor, previous: Tensor, before: Tensor, window: int) -> Sums:
        for row, (_, at) in zip(self.per_tensor, self._rows, strict=True):
            row.copy_(reference.close_sum(running[at], previous[at], before[at], window))
        return self._total()

    def close_delta(self, running: Tensor, previous: Tensor, mean: Tensor, window: int) -> Sums:
        for row, (_, at) in zip(self.per_tensor, self._rows, strict=True):
            row.copy_(reference.close_delta(running[at], previous[at], mean[at], window))
        return self._total()

    def write_back(self, arena: Tensor, mean: Tensor | None, scale: float) -> None:
        for x, at in self._rows:
            reference.write_back(x, arena[at], scale, None if mean is None else mean[at])
        self._plan.publish()

    def _total(self) -> Sums:
        return Sums(*(self._plan.row_weights @ self.per_tensor).tolist())
