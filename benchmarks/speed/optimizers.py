"""An optimizer for benchmarks of the schedulers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer


class OneMoves(Optimizer):
    """Moves its first parameter only: the time of a step must not hide that of the meter."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.first = params[0]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Add noise to it."""
        self.first.add_(torch.randn_like(self.first), alpha=0.01)
