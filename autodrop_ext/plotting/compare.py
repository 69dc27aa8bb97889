"""Picture of several measured runs, to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .panels import (
    Record,
    column,
    draw_losses,
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
) -> Figure:
    """Draw several measured runs into one picture: losses, angles and learning rates.

    Losses and angles are running means, because angles of single windows scatter too much for
    several runs to share a panel; behind the losses the values themselves are thin lines.

    Args:
        runs: Readings and metrics by name, as :func:`~autodrop_ext.read_log` returns them. Of
            several param groups the first one's rate is drawn.
        path: The picture; its ending gives the format.

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
    if losses:
        draw_losses(panels[0], losses, styles)
    name_panel(
        angle, "Angular velocity, running mean (comparable only between equal windows)", "degrees"
    )
    name_panel(rate, "Learning rate", "learning rate")
    everything: list[float] = []
    lines = []
    for name, (readings, _) in runs.items():
        steps = column(readings, "step")
        angle.plot(*running_mean(steps, column(readings, "angle")), **styles[name])
        rates = [number((r.get("lr") or [None])[0]) for r in readings]
        everything += rates
        lines += rate.plot(steps, rates, **styles[name], drawstyle="steps-post")
    log_if_wide(rate, everything)
    place: dict[str, Any] = {"loc": "outside upper left", "frameon": False, "fontsize": "small"}
    for text in figure.legend(lines, list(runs), handlelength=3.2, **place).get_texts():
        text.set_parse_math(False)  # A name with two dollar signs is no formula.
    return finish(figure, panels, path, None)
