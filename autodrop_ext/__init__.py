"""Automatic learning-rate drop for PyTorch, for models of any size.

``AutoDrop`` and ``AnytimeAutoDrop`` take the place of a learning-rate scheduler.
``AngularVelocity`` is the meter that they decide from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import checks  # noqa: F401
from .agreement import DisagreementError
from .log import JsonLinesLog, read_log
from .meter import AngularVelocity
from .ranks import PipelineStages
from .reading import Decision, Reading
from .schedulers import (
    AnytimeAutoDrop,
    AnytimeDecision,
    AutoDrop,
    EpochAutoDrop,
    EpochDecision,
)

if TYPE_CHECKING:
    from .schedulers import AnalyticAutoDrop, AnalyticDrop

__all__ = [
    "AnalyticAutoDrop",
    "AnalyticDrop",
    "AngularVelocity",
    "AnytimeAutoDrop",
    "AnytimeDecision",
    "AutoDrop",
    "Decision",
    "DisagreementError",
    "EpochAutoDrop",
    "EpochDecision",
    "JsonLinesLog",
    "PipelineStages",
    "Reading",
    "read_log",
]


def __getattr__(name: str) -> Any:
    if name in ("AnalyticAutoDrop", "AnalyticDrop"):
        from . import schedulers

        return getattr(schedulers, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("autodrop_ext")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
