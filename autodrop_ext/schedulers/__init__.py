"""Schedulers: they decide from readings and change learning rates."""

from .analytic import AnalyticAutoDrop, AnalyticDrop
from .autodrop import AutoDrop
from .epoch import EpochAutoDrop, EpochDecision

__all__ = ["AnalyticAutoDrop", "AnalyticDrop", "AutoDrop", "EpochAutoDrop", "EpochDecision"]
