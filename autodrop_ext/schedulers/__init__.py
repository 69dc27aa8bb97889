"""Schedulers: they decide from readings and change learning rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .anytime import AnytimeAutoDrop, AnytimeDecision
from .autodrop import AutoDrop
from .epoch import EpochAutoDrop, EpochDecision

if TYPE_CHECKING:
    from .analytic import AnalyticAutoDrop, AnalyticDrop

__all__ = [
    "AnalyticAutoDrop",
    "AnalyticDrop",
    "AnytimeAutoDrop",
    "AnytimeDecision",
    "AutoDrop",
    "EpochAutoDrop",
    "EpochDecision",
]


def __getattr__(name: str) -> Any:
    # Few programs need the analytic scheduler and its model.
    if name in ("AnalyticAutoDrop", "AnalyticDrop"):
        from . import analytic

        return getattr(analytic, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
