"""The reference as a backend: any device, one tensor after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..plan import Plan
from .base import Sums


class ReferenceBackend:
    name = "reference"

    def missing(self, device_type: str) -> str | None:
        return None

    def bind(self, plan: Plan) -> ReferenceOperations:
        return ReferenceOperations(plan)


class ReferenceOperations:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.per_tensor = torch.zeros(
            len(plan.segments), 4, dtype=torch.float64, device=plan.device
        )

    def accumulate(
        self, running: Tensor, mean: Tensor | None, *, first: bool, weight: float = 1.0
    ) -> None:
        self._plan.refresh()
        for s in self._plan.segments:
            M = None if mean is None else s.in_arena(mean)
            reference.accumulate(s.in_arena(running), s.flat, M, first=first, weight=weight)

    def close_sum(self, running: Tensor, previous: Tensor, before: Tensor, window: int) -> Sums:
        for row, s in zip(self.per_tensor, self._plan.segments, strict=True):
            A, P, PP = (s.in_arena(arena) for arena in (running, previous, before))
            row.copy_(reference.close_sum(A, P, PP, window))
        return self._total()

    def close_delta(self, running: Tensor, previous: Tensor, mean: Tensor, window: int) -> Sums:
        for row, s in zip(self.per_tensor, self._plan.segments, strict=True):
            A, S, M = (s.in_arena(arena) for arena in (running, previous, mean))
            row.copy_(reference.close_delta(A, S, M, window))
        return self._total()

    def write_back(self, arena: Tensor, mean: Tensor | None, scale: float) -> None:
        for s in self._plan.segments:
            M = None if mean is None else s.in_arena(mean)
            reference.write_back(s.flat, s.in_arena(arena), scale, M)
        self._plan.publish()

    def _total(self) -> Sums:
        return Sums(*(self._plan.weights @ self.per_tensor).tolist())
