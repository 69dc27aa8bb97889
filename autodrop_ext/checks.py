"""Checks of what schedulers are given: which argument, what was expected, what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any


def check_number(name: str, value: Any, expected: str, accepted: Callable[[float], bool]) -> None:
    """Raises TypeError or ValueError unless ``value`` is a real number that is ``accepted``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not accepted(float(value)):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_factor(factor: Any) -> None:
    """Raises TypeError or ValueError unless a drop by ``factor`` lowers a rate."""
    check_number("factor", factor, "a number between 0 and 1", lambda x: 0 < x < 1)


def check_count(name: str, value: Any, least: int) -> None:
    """Raises TypeError or ValueError unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_callback(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a function or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function or None, got {value!r}")


def floors(min_lr: float | Iterable[float], groups: int) -> list[float]:
    """One lower bound per param group, from one for all or one for each.

    Raises:
        TypeError, ValueError: not a number or not one per group.
    """
    values = list(min_lr) if isinstance(min_lr, Iterable) else [min_lr] * groups
    if len(values) != groups:
        raise ValueError(
            f"min_lr: expected one number or {groups}, one per param group, got {len(values)}"
        )
    for value in values:
        check_number("min_lr", value, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
    return [float(value) for value in values]
