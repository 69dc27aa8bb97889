"""Picture of several measured runs, to be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .panels import (
    Record,
    column,
    draw_losses,
    finish,
    line_style,
    log_if_wide,
    make_panels,
    name_panel,
    smoothed_line,
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
    # A run keeps its colour in all panels, also if another one has no loss.
    styles = {name: line_style(i) for i, name in enumerate(runs)}
    if losses:
        draw_losses(panels[0], losses, styles)
    name_panel(angle, "Angular velocity, smoothed", "degrees")
    name_panel(rate, "Learning rate", "learning rate")
    everything: list[float] = []
    for name, (readings, _) in runs.items():
        steps, values = smoothed_line(readings)
        if not any(map(math.isfinite, values)):
            steps, values = column(readings, "step"), column(readings, "angle")
        label = None if losses else name
        angle.plot(steps, values, **styles[name], marker=".", markersize=3, label=label)
        rates = column([{"lr": (r.get("lr") or [None])[0]} for r in readings], "lr")
        everything += rates
        rate.plot(
            column(readings, "step"), rates, **styles[name], drawstyle="steps-post", label=name
        )
    log_if_wide(rate, everything)
    return finish(figure, panels, path, title)
