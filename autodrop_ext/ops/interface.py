"""What every backend offers: the three operations of the reference, over a plan."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .plan import Plan

Form = Literal["sum", "delta"]


class Sums(NamedTuple):
    """Totals over a plan at a window's end, in float64 (``csrc/core/tables.h``)."""

    dot: float
    """``<s_i, s_{i-1}>``"""
    norm: float
    """``|s_i|^2``"""
    previous_norm: float
    """``|s_{i-1}|^2``"""
    mean_norm: float
    """``|m_i|^2``"""

    def __add__(self, other: object) -> Sums:
        if not isinstance(other, Sums):
            return NotImplemented
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


class Operations(Protocol):
    """The three operations, bound to one plan. Arenas are float32 ``[plan.arena_elements]``."""

    per_tensor: Tensor
    """float64 ``[num_rows, 4]``: unweighted :class:`Sums` of each row of the plan (a tensor, or a
    range of one) at the last close."""

    def accumulate(
        self, running: Tensor, mean: Tensor | None, *, first: bool, weight: float = 1.0
    ) -> None:
        """As :func:`reference.accumulate`, for every tensor."""

    def close_sum(self, running: Tensor, previous: Tensor, before: Tensor, window: int) -> Sums:
        """As :func:`reference.close_sum`, weighted total over the rows."""

    def close_delta(self, running: Tensor, previous: Tensor, mean: Tensor, window: int) -> Sums:
        """As :func:`reference.close_delta`, weighted total over the rows."""

    def write_back(self, arena: Tensor, mean: Tensor | None, scale: float) -> None:
        """As :func:`reference.write_back`, for every tensor."""


class Backend(Protocol):
    """A way to run the operations on some devices."""

    name: str

    def missing(self, device: torch.device) -> str | None:
        """Why this backend does not serve a device, or None if it does. Touches no other one."""

    def bind(self, plan: Plan) -> Operations:
        """The operations on a plan; everything that can be prepared is prepared here."""
