"""Runs and their settings as lines of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..settings import unit_of, usual_values
from .panels import Record, number


def title_of(
    settings: Mapping[str, Any],
    readings: Sequence[Record],
    name: str = "",
    *,
    metrics: Sequence[Record] = (),
) -> str:
    """Return a picture's title: the scheduler, its settings, the steps, and the drops if counted.

    Args:
        settings: Of the scheduler, as a log's header has them; none in logs of other programs.
        readings: At least one.
        name: Of the run, for a title if the settings do not say which scheduler it was.
        metrics: Of the run; they may go on after the last reading.
    """
    what = describe(settings)
    if "scheduler" not in settings:
        what = ": ".join(filter(None, [name, what]))
    ends = [number(records[-1].get("step")) for records in (readings, metrics) if records]
    facts = [count(int(max(filter(math.isfinite, ends), default=0)), "step")]
    if not any("power" in reading for reading in readings):  # there it falls at nearly every one
        facts.append(count(sum(bool(r.get("dropped")) for r in readings), "drop"))
    return "; ".join(filter(None, [what, ", ".join(facts)]))


def describe(settings: Mapping[str, Any]) -> str:
    """Return a run's settings as a line: the scheduler, and what is not as usual."""
    words = [str(settings["scheduler"])] if "scheduler" in settings else []
    for name, value in settings.items():
        if name == "cooldown":
            words.append(_describe_cooldown(value))
            continue
        values = value if isinstance(value, list) else [value]
        if name in ("scheduler", "version") or not values:
            continue
        if all(v in usual_values(name) for v in values):
            continue
        numbers = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        # One value for all param groups is one value.
        text = numbers[0] if len(set(numbers)) == 1 else " / ".join(numbers)
        words.append(name if value is True else f"{name} {text}{unit_of(name)}")
    return ", ".join(words)


def _describe_cooldown(cooldown: Any) -> str:
    """A cooldown as text; it may be anything, because another program may have written the log."""
    if not isinstance(cooldown, Mapping):
        return f"cooldown {cooldown}"
    steps, begin, shape = (cooldown.get(key) for key in ("num_steps", "begin", "shape"))
    return f"cooldown ({shape}) over {steps} steps from step {begin}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
