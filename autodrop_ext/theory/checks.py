"""Argument checks that the theory's functions share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any


def number(
    name: str,
    value: Any,
    expected: str = "a finite number above 0",
    accepted: Callable[[float], bool] = lambda x: 0 < x < math.inf,
) -> float:
    """The value as a float; TypeError or ValueError with the argument's name otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not accepted(float(value)):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def at_least_zero(name: str, value: Any) -> float:
    """As :func:`number`, zero included."""
    return number(name, value, "a finite number of at least 0", lambda x: 0 <= x < math.inf)


def fraction(name: str, value: Any) -> float:
    """A momentum or another number in [0, 1)."""
    return number(name, value, "a number from 0 to below 1", lambda x: 0 <= x < 1)


def count(name: str, value: Any, least: int) -> int:
    """The value, an int or an integer of numpy, as an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)
