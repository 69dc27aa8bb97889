"""Picture of several measured runs, to be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from .run import (
    Dashes,
    Record,
    column,
    finish,
    line_style,
    log_if_wide,
    make_panels,
    name_panel,
    smoothed_line,
    steps_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_runs(
    runs: Mapping[str, tuple[Sequence[Record], Sequence[Record]]],
    *,
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw several measured runs into one picture: losses, smoothed angles, learning rates.

    Args:
        runs: readings and metrics by name, as :func:`~autodrop_ext.read_log` gives them; of
            ``AutoDrop`` or ``EpochAutoDrop``, whose angles are not smoothed. Of several param
            groups the first one's rate is drawn.
        path: where to save the picture; its ending gives the format.
        title: above the picture.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: there is no run, or one without readings.
    """
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    for name, (readings, _) in runs.items():
        if not readings:
            raise ValueError(f"runs[{name!r}]: expected at least one reading, got none")
    losses = {n: m for n, (_, m) in runs.items() if any(r.get("loss") is not None for r in m)}
    figure, panels = make_panels([1.2, 1.2, 1.0] if losses else [1.2, 1.0])
    angle, rate = panels[-2:]
    # A run keeps its colour in all panels, also where another one has no loss.
    styles = {name: line_style(i) for i, name in enumerate(runs)}
    if losses:
        name_panel(panels[0], "Training loss")
        _draw_lines(panels[0], losses, styles, "loss")
        panels[0].set_ylabel("loss")
    name_panel(angle, "Angular velocity, smoothed")
    for name, (readings, _) in runs.items():
        steps, values = smoothed_line(readings)
        if not any(map(math.isfinite, values)):
            steps, values = steps_of(readings), column(readings, "angle")
        color, dashes = styles[name]
        axes_label = None if losses else name
        angle.plot(
            steps,
            values,
            color=color,
            linestyle=dashes,
            linewidth=1.4,
            label=axes_label,
            marker=".",
            markersize=3,
        )
    angle.set_ylabel("degrees")
    name_panel(rate, "Learning rate")
    rates = {
        name: [{"step": r["step"], "lr": (r.get("lr") or [None])[0]} for r in readings]
        for name, (readings, _) in runs.items()
    }
    _draw_lines(rate, rates, styles, "lr", drawstyle="steps-post")
    rate.set_ylabel("learning rate")
    finish(figure, panels, path, title)
    return figure


def _draw_lines(
    axes: Axes,
    runs: Mapping[str, Sequence[Record]],
    styles: Mapping[str, tuple[str, Dashes]],
    key: str,
    drawstyle: Literal["default", "steps-post"] = "default",
) -> None:
    """One line for each run that has the key."""
    everything: list[float] = []
    for name, records in runs.items():
        having = [r for r in records if key in r]
        values = column(having, key)
        everything += values
        color, dashes = styles[name]
        axes.plot(
            steps_of(having),
            values,
            color=color,
            linestyle=dashes,
            linewidth=1.4,
            drawstyle=drawstyle,
            label=name,
        )
    log_if_wide(axes, everything)
