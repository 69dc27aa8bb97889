"""Automatic learning-rate drop for PyTorch, for models of any size.

``AutoDrop`` takes the place of a learning-rate scheduler. ``AngularVelocity`` is the meter that it
decides from.
"""

from __future__ import annotations

from typing import Any

from . import checks  # noqa: F401
from .log import JsonLinesLog, TeeLog, read_log
from .meter import AngularVelocity
from .reading import Decision, Reading
from .schedulers import (
    AnalyticAutoDrop,
    AnalyticDrop,
    AnytimeAutoDrop,
    AnytimeDecision,
    AutoDrop,
    EpochAutoDrop,
    EpochDecision,
)

__all__ = [
    "AnalyticAutoDrop",
    "AnalyticDrop",
    "AngularVelocity",
    "AnytimeAutoDrop",
    "AnytimeDecision",
    "AutoDrop",
    "Decision",
    "EpochAutoDrop",
    "EpochDecision",
    "JsonLinesLog",
    "Reading",
    "TeeLog",
    "read_log",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("autodrop_ext")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
