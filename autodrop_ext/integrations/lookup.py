"""Finding the schedulers of this package inside what other libraries hold."""

from __future__ import annotations

from typing import Any

from ..schedulers.base import StepScheduler


def find_schedulers(scheduler: Any) -> list[Any]:
    """Those in ``scheduler``: itself, or inside of accelerate's wrapper and torch's combinations.

    ``SequentialLR`` and ``ChainedScheduler`` may hold several.
    """
    if isinstance(scheduler, StepScheduler):
        return [scheduler]
    inner = [*getattr(scheduler, "_schedulers", ()), getattr(scheduler, "scheduler", None)]
    return [s for part in inner if part is not None for s in find_schedulers(part)]


def prefixed(prefix: str, schedulers: list[Any]) -> dict[str, float]:
    """Newest values of all schedulers; where there are several, their number follows the prefix."""
    metrics: dict[str, float] = {}
    for i, scheduler in enumerate(schedulers):
        front = prefix if len(schedulers) == 1 else f"{prefix}{i}/"
        metrics |= {front + name: value for name, value in scheduler.get_metrics().items()}
    return metrics
