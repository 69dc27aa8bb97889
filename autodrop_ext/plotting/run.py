"""Picture of a run: when a learning rate dropped, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .anytime import plot_anytime
from .curves import draw_rates, mark_drops, panels_of
from .panels import DROP, LIMIT, OWN, RAW, Record, column, finish, line_style, name_panel, number

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
    figure, panels = panels_of("readings", readings, metrics, [1.2, 1.2, 1.0])
    angle, rise, rate = panels[-3:]
    readings = [
        {**r, "threshold": threshold if r.get("threshold") is None else r["threshold"]}
        for r in readings
    ]
    groups = _by_group(readings)
    _draw_angle(angle, readings, groups)
    tracks = groups or [readings]
    _draw_rise(rise, tracks)
    _draw_threshold(rise, readings, tracks)
    steps = column(readings, "step")
    draw_rates(rate, steps, readings)
    mark_drops(panels, [s for s, r in zip(steps, readings, strict=True) if r.get("dropped")])
    return finish(figure, panels, path, title)


def _by_group(readings: Sequence[Record]) -> list[list[Record]]:
    """Return the records of each param group if groups decide for themselves, otherwise none."""
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


def _draw_angle(axes: Axes, readings: Sequence[Record], groups: Sequence[Sequence[Record]]) -> None:
    name_panel(axes, "Angular velocity", "degrees")
    steps, angles = column(readings, "step"), column(readings, "angle")
    errors = [2 * error for error in column(readings, "standard_error")]
    _draw_band(axes, steps, angles, errors, "two standard errors")
    label = "each window, whole model" if groups else "each window"
    axes.plot(steps, angles, ".", color=RAW, markersize=3, label=label)
    for g, records in enumerate(groups or [readings]):
        label = f"group {g}, smoothed" if groups else "smoothed (starts over after a drop)"
        style: dict[str, Any] = {**line_style(g), "marker": ".", "markersize": 4.5, "label": label}
        axes.plot(*_smoothed_line(records), **style)


def _draw_band(
    axes: Axes, x: Sequence[float], middle: Sequence[float], half: Sequence[float], label: str
) -> None:
    """Draw a band of half this width on both sides of the values, unless it is too thin to see."""
    finite = [m for m in middle if math.isfinite(m)]
    # A panel is about 100 pixels high: a band of a hundredth of it is a line.
    if any(200 * h > max(finite) - min(finite) for h in half if h > 0 and finite):
        low = [m - h for m, h in zip(middle, half, strict=True)]
        high = [m + h for m, h in zip(middle, half, strict=True)]
        axes.fill_between(x, low, high, color=RAW, alpha=0.3, linewidth=0, label=label)


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


def _effect(reading: Record) -> str:
    """Return what came of a rise; one below the threshold lowers no rate at ``min_lr``."""
    if reading.get("dropped"):
        return "dropped"
    return "held back" if number(reading.get("rise")) < number(reading.get("threshold")) else "kept"


def _draw_rise(axes: Axes, tracks: Sequence[Sequence[Record]]) -> None:
    """Draw the rises of each param group, or of all of them together if they decide as one."""
    several = len(tracks) > 1
    why = " (colours as above)" if several else ": why the rate drops"
    name_panel(axes, f"Rise of the smoothed angle{why}", "degrees\nper window")
    effects = {effect for readings in tracks for effect in map(_effect, readings)}
    for g, readings in enumerate(tracks):
        for effect, mark, own in (
            ("kept", "o", OWN),
            ("held back", "v", DROP),
            ("dropped", "v", DROP),
        ):
            if effect == "held back" and effect not in effects:
                continue
            points = [r for r in readings if _effect(r) == effect]
            color = line_style(g)["color"] if several else own
            style: dict[str, Any] = {
                "color": color,
                "markerfacecolor": "none" if effect == "held back" else color,
                "linestyle": "",
                "gid": effect,
                "markersize": 3.5 if mark == "o" else 4.5 if several else 4,
                "label": None if several else effect,
            }
            axes.plot(column(points, "step"), column(points, "rise"), mark, **style)
            if several and g == len(tracks) - 1:  # a legend of the marks alone
                face = "none" if effect == "held back" else RAW
                style = {"color": RAW, "markerfacecolor": face, "markersize": 4}
                axes.plot([], [], mark, label=effect, **style)


def _draw_threshold(
    axes: Axes, readings: Sequence[Record], tracks: Sequence[Sequence[Record]]
) -> None:
    """Draw the threshold of each part of the run, and the zone below it, in which rates drop."""
    compared = [r for r in readings if math.isfinite(number(r.get("threshold")))]
    if not compared:
        return
    steps, limits = column(compared, "step"), column(compared, "threshold")
    rises = [v for records in tracks for v in column(records, "rise") if math.isfinite(v)]
    lowest, highest = min([*limits, *rises]), max([*limits, *rises])
    span = highest - lowest or 1.0
    distinct = list(dict.fromkeys(f"{limit:g}°" for limit in limits))
    line: dict[str, Any] = {"color": LIMIT, "linewidth": 1, "linestyle": "--"}
    line["label"] = f"threshold {', then '.join(distinct)}"
    zone: dict[str, Any] = {"color": DROP, "alpha": 0.06, "linewidth": 0}
    if len(distinct) == 1:
        axes.axhline(limits[0], **line)
        axes.axhspan(lowest - span, limits[0], **zone)
    else:
        axes.plot(steps, limits, **line, drawstyle="steps-post")
        axes.fill_between(steps, lowest - span, limits, step="post", **zone)
    axes.set_ylim(lowest - 0.08 * span, lowest + 1.08 * span)
