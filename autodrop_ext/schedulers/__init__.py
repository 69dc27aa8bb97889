"""Schedulers: they decide from readings and change learning rates."""

from .analytic import AnalyticAutoDrop
from .autodrop import AutoDrop
from .epoch import EpochAutoDrop, EpochDecision

__all__ = ["AnalyticAutoDrop", "AutoDrop", "EpochAutoDrop", "EpochDecision"]
