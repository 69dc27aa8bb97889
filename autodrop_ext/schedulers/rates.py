"""Learning rates of param groups, which are floats or tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def dropped(lr: float | Tensor, factor: float, floor: float) -> float | None:
    """``max(floor, factor * lr)`` in the rate's own precision; None where that is not lower."""
    now = float(lr)
    lower = in_precision_of(lr, max(floor, factor * now))
    return lower if lower < now else None


def in_precision_of(lr: float | Tensor, value: float) -> float:
    """What a learning rate becomes when it is set to a value: a tensor rounds it."""
    if not isinstance(lr, Tensor):
        return value
    return float(torch.tensor(value, dtype=lr.dtype, device="cpu"))


def lower_bounds(min_lrs: Sequence[float], groups: int) -> Iterator[float]:
    """One lower bound for each param group; 0 for those that were added later."""
    return (min_lrs[i] if i < len(min_lrs) else 0.0 for i in range(groups))


def write(group: dict[str, Any], lr: float) -> functools.partial[Any]:
    """What sets a param group's rate, in place if that is a tensor; call it without gradients."""
    if isinstance(group["lr"], Tensor):
        return functools.partial(group["lr"].fill_, lr)
    return functools.partial(group.__setitem__, "lr", lr)


def as_floats(lrs: Iterable[float | Tensor]) -> list[float]:
    """Learning rates as plain floats, for logs and checkpoints."""
    return [float(lr) for lr in lrs]
