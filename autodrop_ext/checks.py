"""Checks of arguments: an error says which argument, what was expected, what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

Check = Callable[[str, Any], Any]
"""Takes a name for messages and a value; returns the value, converted, or raises an error."""

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "autodrop_ext needs torch, which is not installed. For NVIDIA GPUs: pip install torch; "
        "https://pytorch.org/get-started has the commands for the CPU alone and for other GPUs",
        name="torch",
    ) from None

OLDEST_TORCH = (2, 6)


def check_torch(version: str) -> None:
    """Raise ImportError unless a version such as "2.13.0+cpu" is new enough."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        raise ImportError(
            f"autodrop_ext needs torch {oldest} or newer, got torch {version}: "
            f"pip install --upgrade 'torch>={oldest}'"
        )


check_torch(torch.__version__)  # before anything fails with an error that does not say so


def number(
    name: str,
    value: Any,
    expected: str = "a finite number above 0",
    accepted: Callable[[float], bool] = lambda x: 0 < x < math.inf,
) -> float:
    """Return the value as a float.

    Raises:
        TypeError, ValueError: It is no real number, or not ``accepted``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    try:
        converted = float(value)
    except OverflowError:  # an int beyond the range of floats
        converted = math.inf
    if not accepted(converted):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return converted


def at_least_zero(name: str, value: Any) -> float:
    """Check a finite number of at least 0."""
    return number(name, value, "a finite number of at least 0", lambda x: 0 <= x < math.inf)


def between_0_and_1(name: str, value: Any) -> float:
    """Check a number that a rate can be lowered by, in (0, 1)."""
    return number(name, value, "a number between 0 and 1", lambda x: 0 < x < 1)


def finite(name: str, value: Any, expected: str = "a finite number") -> float:
    """Check a finite number."""
    return number(name, value, expected, math.isfinite)


def cosine(name: str, value: Any) -> float:
    """Check a cosine."""
    return number(name, value, "a number from -1 to 1", lambda x: -1 <= x <= 1)


def tau0(name: str, value: Any) -> float:
    """Check Algorithm 2's initial threshold, in (0, 2) as in Theorem 5.2 of UAI 2024."""
    return number(name, value, "a number between 0 and 2", lambda x: 0 < x < 2)


def one_or_several(name: str, value: Any) -> float | list[float]:
    """Check a finite number of at least 0, or several."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return at_least_zero(name, value)
    return [at_least_zero(name, one) for one in value]


def count(name: str, value: Any, least: int) -> int:
    """Return the value as an int of at least ``least`` and of 63 bits at most.

    Raises:
        TypeError, ValueError: It is no int, or not in that range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    converted = int(value)
    if converted >= 1 << 63:
        bits = converted.bit_length()
        raise ValueError(f"{name}: expected less than 2**63, got an int of {bits} bits")
    return converted


def at_least(least: int) -> Check:
    """Return the check of :func:`count` with this lower bound."""
    return lambda name, value: count(name, value, least)


def steps_or_auto(name: str, value: Any) -> int | str:
    """A number of optimizer steps, or "auto"."""
    if isinstance(value, str) and value != "auto":
        raise ValueError(f"{name}: expected an int or 'auto', got {value!r}")
    return value if isinstance(value, str) else count(name, value, 0)


def buckets(name: str, value: Any) -> int | None:
    """Check the number of buckets of a table; None for one bucket an element."""
    if value is not None and count(name, value, 4096) % 4096:
        raise ValueError(f"{name}: expected None or a multiple of 4,096, got {value}")
    return None if value is None else int(value)


def flag(name: str, value: Any) -> bool:
    """Check a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value


def text(name: str, value: Any) -> str:
    """Check a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {value!r}")
    return value


def choice(*accepted: str) -> Check:
    """Return the check of one of some strings."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in accepted:
            *first, last = map(repr, accepted)
            raise ValueError(f"{name}: expected {', '.join(first)} or {last}, got {value!r}")
        return value

    return check


def none_or(check: Check) -> Check:
    """Return a check that accepts None, too."""
    return lambda name, value: None if value is None else check(name, value)


def callback(name: str, value: Any) -> None:
    """Check a function or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function or None, got {value!r}")
