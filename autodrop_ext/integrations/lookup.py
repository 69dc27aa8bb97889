"""The schedulers of this package inside what other libraries hold."""

from __future__ import annotations

from typing import Any

from ..schedulers.base import StepScheduler


def find_schedulers(scheduler: Any) -> list[Any]:
    """Return ``scheduler`` itself, or those inside accelerate's wrapper or torch's combinations.

    ``SequentialLR`` and ``ChainedScheduler`` may hold several.
    """
    if isinstance(scheduler, StepScheduler):
        return [scheduler]
    inner = [*getattr(scheduler, "_schedulers", ()), getattr(scheduler, "scheduler", None)]
    return [s for part in inner if part is not None for s in find_schedulers(part)]


def prefixed(prefix: str, schedulers: list[Any]) -> dict[str, float]:
    """Return the newest values of all schedulers; of several, the number follows the prefix."""
    return {
        (prefix if len(schedulers) == 1 else f"{prefix}{i}/") + name: value
        for i, scheduler in enumerate(schedulers)
        for name, value in scheduler.get_metrics().items()
    }
