"""Runs and their settings as lines of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..settings import unit_of, usual_values
from .panels import Record, number


def kind_of(readings: Sequence[Record]) -> Literal["windows", "epochs", "growing", "model"]:
    """Return what readings are about; ``AnytimeAutoDrop`` has growing windows."""
    names = {name for reading in readings for name in reading}
    if "modelled" in names:
        return "model"
    return "epochs" if "waited" in names else "growing" if "power" in names else "windows"


def title_of(
    settings: Mapping[str, Any],
    readings: Sequence[Record],
    name: str = "",
    metrics: Sequence[Record] = (),
) -> str:
    """Return a picture's title: the scheduler, its settings, the steps and the drops.

    Args:
        settings: Of the scheduler, as a log's header has them; none in logs of other programs.
        readings: At least one.
        name: Of the run, for a title if the settings do not say which scheduler it was.
        metrics: Of the run; they may go on after the last reading.
    """
    what = describe(settings)
    if "scheduler" not in settings:
        what = ": ".join(filter(None, [printable(name), what]))
    ends = [number(records[-1].get("step")) for records in (readings, metrics) if records]
    facts = [count(int(max(filter(math.isfinite, ends), default=0)), "step")]
    if kind_of(readings) != "growing":  # there it falls at nearly every one
        facts.append(count_drops(readings))
    return "; ".join(filter(None, [what, ", ".join(facts)]))


def describe(settings: Mapping[str, Any]) -> str:
    """Return a run's settings as a line: the scheduler, and what is not as usual."""
    words = [str(settings["scheduler"])] if "scheduler" in settings else []
    for name, value in settings.items():
        if isinstance(value, Mapping):  # a cooldown
            value = [" ".join(f"{key} {item}" for key, item in value.items())]
        values = value if isinstance(value, list) else [value]
        if name in ("scheduler", "version") or all(v in usual_values(name) for v in values):
            continue
        numbers = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        # One value for all param groups is one value.
        text = numbers[0] if len(set(numbers)) == 1 else " / ".join(numbers)
        words.append(name if value is True else f"{name} {text}{unit_of(name)}")
    return printable(", ".join(words))


def count_drops(readings: Sequence[Record]) -> str:
    """Return the number of drops with its noun."""
    return count(sum(bool(r.get("dropped")) for r in readings), "drop")


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def printable(text: str) -> str:
    r"""Return the text with escapes such as ``\x1b`` for what would control a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
