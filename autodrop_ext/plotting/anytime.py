"""Picture of a run of ``AnytimeAutoDrop``: how fast the learning rate fell, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .curves import draw_rates, panels_of
from .panels import (
    LIMIT,
    OWN,
    RAW,
    Record,
    column,
    finish,
    line_style,
    log_steps,
    mean,
    name_panel,
)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_anytime(
    decisions: Sequence[Record],
    metrics: Sequence[Record] = (),
    *,
    critical: float | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the loss, the cosine of the angle, the exponent and the learning rate of a run.

    The axis of the steps is logarithmic, because windows grow with the run, so that a rate that
    falls as a power of the steps is a straight line.

    Args:
        decisions: The scheduler's decisions as dicts. Of each, ``step``, ``window_steps`` (the
            length of the window), ``cosine``, ``mean_cosine``, ``power`` (the exponent) and ``lr``
            are drawn.
        metrics: Dicts with ``step`` and ``loss``. Without a loss there is no panel for it.
        critical: The scheduler's cosine below which the rate falls, drawn as a line. 1/4 is that
            of a random walk.
        path: The picture; its ending gives the format.
        title: The text above the picture.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: There are no decisions.
    """
    how = ", mean over the last tenth of the steps so far"
    figure, panels = panels_of("decisions", decisions, metrics, [1.2, 1.0, 1.0], _tail_mean, how)
    cosine, power, rate = panels[-3:]
    steps = column(decisions, "step")
    name_panel(cosine, "Cosine of the angle: why the rate falls", "cosine")
    cosine.plot(steps, column(decisions, "cosine"), ".", color=RAW, markersize=4, label="window")
    cosine.plot(steps, column(decisions, "mean_cosine"), **line_style(0), label="mean")
    if critical is not None:
        label = f"critical {critical:g}"
        cosine.axhline(critical, color=LIMIT, linewidth=1, linestyle="--", label=label)
    name_panel(power, "Exponent p: the rate falls as step$^{-p}$", "exponent")
    power.plot(steps, column(decisions, "power"), color=OWN, linewidth=1.4, drawstyle="steps-pre")
    power.set_ylim(bottom=0)
    draw_rates(rate, steps, decisions)
    _mark_doublings(panels, steps, column(decisions, "window_steps"))
    log_steps(rate)
    return finish(figure, panels, path, title)


def _tail_mean(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return steps, and the mean of the values over the last tenth of the steps up to each.

    On a logarithmic axis a mean over a fixed number of steps would be too long at first, and too
    short at last.
    """
    at: list[float] = []
    means: list[float] = []
    first = 0
    for i, step in enumerate(steps):
        while steps[first] < 0.9 * step:
            first += 1
        if not at or step > 1.005 * at[-1]:  # More points than these are in one place.
            at.append(step)
            means.append(mean(values[first : i + 1]))
    return at, means


def _mark_doublings(
    panels: Sequence[Axes], steps: Sequence[float], lengths: Sequence[float]
) -> None:
    """Draw a thin grey line through all panels at which windows become longer."""
    at = [i for i in range(1, len(steps)) if lengths[i] > lengths[i - 1]]
    dotted: dict[str, Any] = {"color": RAW, "linestyle": ":"}
    for axes in panels:
        for i in at:
            axes.axvline(steps[i], linewidth=0.6, zorder=1, **dotted)
    if at:
        note = f"window doubles, from {lengths[0]:,.0f} to {lengths[at[-1]]:,.0f} steps"
        panels[-1].plot([], [], linewidth=1, label=note, **dotted)
