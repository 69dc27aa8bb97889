"""Pictures of a run: when a learning rate dropped, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
        threshold: The scheduler's threshold in degrees per window, of readings that do not hold
            theirs. It is drawn as a line; without any, drops that ``min_lr`` held back look like
            rates that were kept.
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
    _draw_rise(rise, groups or [readings], threshold)
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
                "threshold": r.get("threshold"),
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


def _draw_rise(axes: Axes, of_groups: Sequence[Sequence[Record]], threshold: float | None) -> None:
    """Draw the rises of each param group, or of all of them together if they decide as one."""
    several = len(of_groups) > 1
    why = " (colours as above)" if several else ": why the rate drops"
    name_panel(axes, f"Rise of the smoothed angle{why}", "degrees\nper window")
    drawn: dict[str, str] = {}
    for g, readings in enumerate(of_groups):
        for marker, kind, points in _kinds_of_rises(readings, threshold):
            own = OWN if kind == "kept" else DROP
            color = line_style(g)["color"] if several else own
            axes.plot(
                [step for step, _ in points],
                [rise for _, rise in points],
                marker,
                color=color,
                markerfacecolor="none" if kind == "held back" else color,
                markersize=3.5 if marker == "o" else 4.5 if several else 4,
                label=None if several else kind,
                gid=kind,
                linestyle="",
            )
            drawn[kind] = marker
    if several:  # a legend of the marks alone
        for kind, marker in drawn.items():
            face = "none" if kind == "held back" else RAW
            axes.plot([], [], marker, color=RAW, markerfacecolor=face, markersize=4, label=kind)
    _draw_threshold(axes, [r for group in of_groups for r in group], threshold)


def _kinds_of_rises(
    readings: Sequence[Record], threshold: float | None
) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """Return marker, name, and steps with rises, of each kind that there is."""
    rises = column(readings, "rise")
    # A rise below the threshold lowers no rate that is at min_lr already or in a cooldown.
    below = [
        limit is not None and rise < limit
        for rise, limit in zip(rises, _thresholds(readings, threshold), strict=True)
    ]
    dropped = [bool(r.get("dropped")) for r in readings]
    kinds = []
    for chosen, marker, kind in (
        ((False, False), "o", "kept"),
        ((False, True), "v", "held back"),
        ((True, None), "v", "dropped"),
    ):
        points = [
            (number(r["step"]), rise)
            for r, rise, at_drop, is_below in zip(readings, rises, dropped, below, strict=True)
            if at_drop == chosen[0] and chosen[1] in (None, is_below)
        ]
        if points or kind != "held back":
            kinds.append((marker, kind, points))
    return kinds


def _thresholds(readings: Sequence[Record], threshold: float | None) -> list[float | None]:
    """What each reading was compared with: a resumed run may have had several thresholds."""
    own = column(readings, "threshold")
    return [threshold if math.isnan(limit) else limit for limit in own]


def _draw_threshold(axes: Axes, readings: Sequence[Record], threshold: float | None) -> None:
    """Draw the threshold of each part of the run, and the zone below it, where rates drop."""
    readings = sorted(readings, key=lambda r: number(r["step"]))
    pairs = zip(column(readings, "step"), _thresholds(readings, threshold), strict=True)
    steps: list[float] = []
    limits: list[float] = []
    for step, limit in pairs:
        if limit is not None:
            steps.append(step)
            limits.append(limit)
    if not limits:
        return
    values = [v for v in column(readings, "rise") if math.isfinite(v)]
    lowest = min([*limits, *values])
    span = max([*limits, *values]) - lowest or 1.0
    distinct = [f"{limit:g}°" for limit in dict.fromkeys(limits)]
    style: dict[str, Any] = {"color": LIMIT, "linewidth": 1, "linestyle": "--"}
    label = f"threshold {', then '.join(distinct)}"
    if len(distinct) == 1:
        axes.axhline(limits[0], **style, label=label)
        axes.axhspan(lowest - span, limits[0], color=DROP, alpha=0.06, linewidth=0)
    else:
        axes.plot(steps, limits, **style, label=label, drawstyle="steps-post")
        axes.fill_between(
            steps, lowest - span, limits, step="post", color=DROP, alpha=0.06, linewidth=0
        )
    axes.set_ylim(lowest - 0.08 * span, lowest + 1.08 * span)
