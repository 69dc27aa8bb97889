"""Pictures of a run: when a learning rate dropped, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .anytime import plot_anytime
from .panels import (
    DROP,
    LIMIT,
    OWN,
    RAW,
    Record,
    column,
    draw_losses,
    draw_rates,
    finish,
    line_style,
    make_panels,
    mark_drops,
    name_panel,
    number,
)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_run(
    readings: Sequence[Record],
    metrics: Sequence[Record] = (),
    *,
    threshold: float | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw a run over its optimizer steps: loss, angular velocity, its rise, learning rate.

    Every drop is a thin line through all panels; the panel of the rise shows its cause, a rise
    below the threshold. A run of ``AnytimeAutoDrop`` is drawn by
    :func:`~autodrop_ext.plotting.anytime.plot_anytime`.

    Args:
        readings: Dicts of ``Decision.as_dict()``, or the readings of ``read_log``.
        metrics: Dicts with ``step`` and ``loss``, or the metrics of ``read_log``. Without a loss
            among them there is no panel for it.
        threshold: The scheduler's threshold in degrees per window, drawn as a line. Without it,
            drops that ``min_lr`` held back look like rates that were kept.
        path: The picture; its ending gives the format.
        title: The text above the picture.

    Returns:
        The figure, which belongs to no window and to no ``pyplot`` state.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: There are no readings.
    """
    if any("power" in reading for reading in readings):
        return plot_anytime(readings, metrics, path=path, title=title)
    if not readings:
        raise ValueError(
            "readings: expected at least one, got none; the first comes at the end of the third "
            "window"
        )
    has_loss = any(m.get("loss") is not None for m in metrics)
    figure, panels = make_panels([1.2, 1.2, 1.2, 1.0] if has_loss else [1.2, 1.2, 1.0])
    angle, rise, rate = panels[-3:]
    if has_loss:
        draw_losses(panels[0], {"loss": metrics}, {"loss": line_style(0)})
    groups = _by_group(readings)
    _draw_angle(angle, readings, groups)
    _draw_rise(rise, [r for g in groups for r in g] if groups else readings, threshold)
    steps = column(readings, "step")
    draw_rates(rate, steps, readings)
    mark_drops(panels, [s for s, r in zip(steps, readings, strict=True) if r.get("dropped")])
    return finish(figure, panels, path, title)


def _by_group(readings: Sequence[Record]) -> list[list[Record]]:
    """The records of each param group, if groups decide for themselves; otherwise none."""
    groups = max(len(r.get("group_angles") or ()) for r in readings)
    return [
        [
            {
                "step": r["step"],
                "smoothed": r["group_smoothed"][g],
                "rise": r["group_rises"][g],
                "dropped": g in r["dropped_groups"],
            }
            for r in readings
            if len(r.get("group_angles") or ()) > g
        ]
        for g in range(groups)
    ]


def _smoothed_line(readings: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Return steps and smoothed angles, with a gap after every drop.

    A drop empties the buffer: what is smoothed after it is not compared with what was before, so
    the line breaks there even if every reading has a smoothed value.
    """
    steps: list[float] = []
    values: list[float] = []
    for reading, value in zip(readings, column(readings, "smoothed"), strict=True):
        gap = bool(reading.get("dropped"))
        steps += [float(reading["step"])] * (1 + gap)
        values += [value, math.nan][: 1 + gap]
    return steps, values


def _draw_angle(axes: Axes, readings: Sequence[Record], groups: Sequence[Sequence[Record]]) -> None:
    name_panel(axes, "Angular velocity", "degrees")
    steps = column(readings, "step")
    angles, margins = column(readings, "angle"), column(readings, "margin")
    if any(margin > 0 for margin in margins):
        axes.fill_between(
            steps,
            [a - m for a, m in zip(angles, margins, strict=True)],
            [a + m for a, m in zip(angles, margins, strict=True)],
            color=RAW,
            alpha=0.3,
            linewidth=0,
            label="95 % interval (sampled)",
        )
    axes.plot(
        steps,
        angles,
        ".",
        color=RAW,
        markersize=3,
        label="each window, whole model" if groups else "each window",
    )
    for g, records in enumerate(groups or [readings]):
        label = f"group {g}, smoothed" if groups else "smoothed (starts over after a drop)"
        axes.plot(
            *_smoothed_line(records), **line_style(g), marker=".", markersize=4.5, label=label
        )


def _draw_rise(axes: Axes, readings: Sequence[Record], threshold: float | None) -> None:
    name_panel(axes, "Rise of the smoothed angle: why the rate drops", "degrees\nper window")
    rises = column(readings, "rise")
    # A rise below the threshold lowers no rate that is at min_lr already or in a cooldown.
    below = [threshold is not None and rise < threshold for rise in rises]
    dropped = [bool(r.get("dropped")) for r in readings]
    for chosen, marker, color, filled, label in (
        ((False, False), "o", OWN, True, "kept"),
        ((False, True), "v", DROP, False, "held back"),
        ((True, None), "v", DROP, True, "dropped"),
    ):
        points = [
            (number(r["step"]), rise)
            for r, rise, at_drop, is_below in zip(readings, rises, dropped, below, strict=True)
            if at_drop == chosen[0] and chosen[1] in (None, is_below)
        ]
        if chosen == (False, True) and not points:
            continue
        axes.plot(
            [step for step, _ in points],
            [rise for _, rise in points],
            marker,
            color=color,
            markerfacecolor=color if filled else "none",
            markersize=3.5 if marker == "o" else 4,
            label=label,
        )
    if threshold is not None:
        axes.axhline(
            threshold, color=LIMIT, linewidth=1, linestyle="--", label=f"threshold {threshold:g}°"
        )
        values = [v for v in rises if math.isfinite(v)]
        lowest = min([threshold, *values])
        span = max([threshold, *values]) - lowest or 1.0
        axes.axhspan(lowest - span, threshold, color=DROP, alpha=0.06, linewidth=0)
        axes.set_ylim(lowest - 0.08 * span, lowest + 1.08 * span)
