"""Checks of what :class:`~autodrop_ext.AngularVelocity` is given."""

from __future__ import annotations

import math
from typing import Any


def check_counting(window: Any, form: Any, per_tensor: Any, per_group: Any) -> None:
    """Raises TypeError or ValueError unless a meter can take these arguments."""
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f"window: expected an int, got {window!r}")
    if window < 1:
        raise ValueError(f"window: expected at least 1 optimizer step, got {window}")
    if form not in ("auto", "sum", "delta"):
        raise ValueError(f"form: expected 'auto', 'sum' or 'delta', got {form!r}")
    for name, value in (("per_tensor", per_tensor), ("per_group", per_group)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {value!r}")


def check_sample(sample: Any, seed: Any, tolerance: Any) -> None:
    """Raises TypeError or ValueError unless a meter can take these arguments."""
    expected = "expected None, 'auto' or a number above 0 and at most 1"
    if isinstance(sample, str) or (isinstance(sample, (int, float)) and not 0 < sample <= 1):
        if sample != "auto":
            raise ValueError(f"sample: {expected}, got {sample!r}")
    elif isinstance(sample, bool) or not isinstance(sample, (int, float, type(None))):
        raise TypeError(f"sample: {expected}, got {sample!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance: expected a number of degrees, got {tolerance!r}")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance: expected degrees above 0, got {tolerance!r}")
