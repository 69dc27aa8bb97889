"""Schedulers: they decide from readings and change learning rates."""

from .analytic import AnalyticAutoDrop, AnalyticDrop
from .anytime import AnytimeAutoDrop, AnytimeDecision
from .autodrop import AutoDrop
from .epoch import EpochAutoDrop, EpochDecision

__all__ = [
    "AnalyticAutoDrop",
    "AnalyticDrop",
    "AnytimeAutoDrop",
    "AnytimeDecision",
    "AutoDrop",
    "EpochAutoDrop",
    "EpochDecision",
]
