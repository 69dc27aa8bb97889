"""Picture of several measured runs, to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .curves import draw_losses
from .panels import (
    Record,
    column,
    finish,
    line_style,
    log_if_wide,
    make_panels,
    name_panel,
    number,
    running_mean,
)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def plot_runs(
    runs: Mapping[str, tuple[Sequence[Record], Sequence[Record]]],
    *,
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw several measured runs into one picture: losses, angles and learning rates.

    Losses and angles are running means over a 40th of each run; behind the losses the values
    themselves are thin lines. Angles of single windows scatter too much for several runs to share
    a panel, and smoothed ones are there for two windows before each drop only.

    Args:
        runs: Readings and metrics by name, as :func:`~autodrop_ext.read_log` returns them. Of
            several param groups the first one's rate is drawn.
        path: The picture; its ending gives the format.
        title: The text above the picture.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: There is no run, or one without readings.
    """
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    for name, (readings, _) in runs.items():
        if not readings:
            raise ValueError(f"runs[{name!r}]: expected at least one reading, got none")
    losses = {n: m for n, (_, m) in runs.items() if any(r.get("loss") is not None for r in m)}
    figure, panels = make_panels([1.2, 1.2, 1.0] if losses else [1.2, 1.0])
    angle, rate = panels[-2:]
    # A run keeps its colour in all panels, also if another one has no loss.
    styles = {name: line_style(i) for i, name in enumerate(runs)}
    if len(losses) > 1:
        draw_losses(panels[0], losses, styles, running_mean, ", running mean")
    elif losses:
        draw_losses(panels[0], losses, styles)
    angles = "Angular velocity, running mean"
    if len({_window_of(readings) for readings, _ in runs.values()}) > 1:
        angles += " (windows of different lengths: not comparable)"
    name_panel(angle, angles, "degrees")
    several = any(len(r.get("lr") or ()) > 1 for readings, _ in runs.values() for r in readings)
    rates_of = "Learning rate of param group 0" if several else "Learning rate"
    name_panel(rate, rates_of, "learning rate")
    everything: list[float] = []
    lines = {}
    for name, (readings, _) in runs.items():
        steps = column(readings, "step")
        angle.plot(*running_mean(steps, column(readings, "angle")), **styles[name])
        rates = [number((r.get("lr") or [None])[0]) for r in readings]
        everything += rates
        (lines[name],) = rate.plot(steps, rates, **styles[name], drawstyle="steps-post")
    log_if_wide(rate, everything)
    return finish(figure, panels, path, title, lines=lines)


def _window_of(readings: Sequence[Record]) -> str:
    """Return the length of a run's windows; only angles of equal ones can be compared."""
    if any("power" in reading for reading in readings):
        return "growing windows"
    first, last = readings[0], readings[-1]
    windows = number(last.get("window")) - number(first.get("window"))
    steps = number(last.get("step")) - number(first.get("step"))
    # A restart of the count, or a single reading, says nothing about the length.
    return f"{steps / windows:.0f} steps" if windows > 0 and steps > 0 else "one reading"
