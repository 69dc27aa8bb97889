"""Picture of a run of ``AnytimeAutoDrop``: how fast the learning rate fell, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .panels import (
    LIMIT,
    OWN,
    RAW,
    Record,
    column,
    draw_rates,
    finish,
    line_style,
    log_if_wide,
    log_steps,
    make_panels,
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

    Returns:
        The figure, which belongs to no window and to no ``pyplot`` state.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: There are no decisions.
    """
    if not decisions:
        raise ValueError(
            "decisions: expected at least one, got none; the first comes at the end of the third "
            "window"
        )
    has_loss = any(m.get("loss") is not None for m in metrics)
    figure, panels = make_panels([1.2, 1.2, 1.0, 1.0] if has_loss else [1.2, 1.0, 1.0])
    cosine, power, rate = panels[-3:]
    steps = column(decisions, "step")
    if has_loss:
        _draw_loss(panels[0], [m for m in metrics if "loss" in m])
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


def _draw_loss(axes: Axes, metrics: Sequence[Record]) -> None:
    name_panel(axes, "Training loss, mean over the last tenth of the steps so far", "loss")
    steps, values = column(metrics, "step"), column(metrics, "loss")
    axes.plot(steps, values, color=OWN, linewidth=0.6, alpha=0.25)
    # On this axis a mean over a fixed number of steps would be too long at first, and too short
    # at last.
    at: list[int] = []
    means: list[float] = []
    first = 0
    for i, step in enumerate(steps):
        while steps[first] < 0.9 * step:
            first += 1
        if not at or step > 1.005 * steps[at[-1]]:  # More points than these are in one place.
            at.append(i)
            means.append(mean(values[first : i + 1]))
    axes.plot([steps[i] for i in at], means, **line_style(0))
    log_if_wide(axes, values)


def _mark_doublings(
    panels: Sequence[Axes], steps: Sequence[float], lengths: Sequence[float]
) -> None:
    """Draw a thin grey line through all panels where windows become longer."""
    at = [i for i in range(1, len(steps)) if lengths[i] > lengths[i - 1]]
    for axes in panels:
        for i in at:
            axes.axvline(steps[i], color=RAW, linewidth=0.6, linestyle=":", zorder=1)
    if at:
        note = f"window doubles, from {lengths[0]:,.0f} to {lengths[at[-1]]:,.0f} steps"
        panels[-1].plot([], [], color=RAW, linewidth=1, linestyle=":", label=note)
