"""Picture of a run: when a learning rate dropped, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .panels import (
    DROP,
    LIMIT,
    OWN,
    RAW,
    Record,
    column,
    draw_losses,
    finish,
    line_style,
    log_if_wide,
    log_steps,
    make_panels,
    mark,
    mark_drops,
    name_panel,
)
from .titles import kind_of, title_of

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHED: dict[str, Any] = {"color": LIMIT, "linewidth": 1, "linestyle": "--"}


def plot_run(
    readings: Sequence[Record],
    metrics: Sequence[Record] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw a run: its loss, angles, what they were compared with, and the learning rates.

    Every drop is a thin red line through all panels. A run of ``AnytimeAutoDrop`` has a logarithmic
    axis of steps, because its windows grow with the run, and grey lines at which they double. A run
    of ``EpochAutoDrop`` has an axis of epochs, no loss, and a coloured band during each delay.

    Args:
        readings: Dicts of ``Decision.as_dict()``, or the readings of ``read_log``.
        metrics: Dicts with ``step`` and ``loss``, or the metrics of ``read_log``. Without a loss
            among them there is no panel for it.
        settings: The scheduler's, as a log's header has them.
        name: The run's, for a title if the settings do not say which scheduler it was.
        path: The picture; its ending gives the format.
        title: The text above the picture, instead of the settings and the number of drops.

    Returns:
        The figure, which belongs to no window and to no ``pyplot`` state.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: There are no readings.
    """
    if not readings:
        raise ValueError("readings: expected at least one, got none")
    settings = settings or {}
    kind = kind_of(readings)
    with_loss = kind != "epochs" and any(m.get("loss") is not None for m in metrics)
    reasons = [1.1] if kind != "model" else []
    figure, panels = make_panels([1.2] * with_loss + [1.2, *reasons, 1.0])
    if with_loss:
        style = {name: line_style(0)}
        draw_losses(panels[0], {name: metrics}, style, growing=kind == "growing")
    x = column(readings, "window" if kind == "epochs" else "step")
    _draw_rates(panels[-1], x, readings)
    if kind == "growing":
        _draw_growing_windows(panels, x, readings, settings.get("critical"))
    else:
        if kind == "model":
            name_panel(panels[0], "Modelled angular velocity", "degrees")
            panels[0].plot(x, column(readings, "modelled"), color=OWN)
        else:
            draw = _draw_epochs if kind == "epochs" else _draw_windows
            draw(panels, x, readings)
        mark_drops(panels, [at for at, r in zip(x, readings, strict=True) if r.get("dropped")])
    for at, r in zip(x, readings, strict=True):
        if r.get("warmup") in ("reached", "confined"):
            mark(panels, [at], f"automatic warm-up ends: {r['warmup']} (blue line)", OWN)
    xlabel = "epoch" if kind == "epochs" else "optimizer step"
    return finish(
        figure, panels, path, title or title_of(settings, readings, name, metrics), xlabel
    )


def _draw_windows(panels: Sequence[Axes], x: Sequence[float], readings: Sequence[Record]) -> None:
    angle, rise = panels[-3:-1]
    groups = max(len(r.get("group_angles") or ()) for r in readings)
    colours = " (colours as above)" if groups else ""
    name_panel(angle, "Angular velocity", "degrees")
    name_panel(rise, f"Rise of the smoothed angle{colours}: why the rate drops", "degrees")
    angles, errors = column(readings, "angle"), column(readings, "standard_error")
    finite = [a for a in angles if math.isfinite(a)]
    # A panel is about 100 pixels high: a band of a hundredth of it is a line.
    if any(200 * e > max(finite) - min(finite) for e in errors if e > 0 and finite):
        low, high = ([a + s * e for a, e in zip(angles, errors, strict=True)] for s in (-2, 2))
        angle.fill_between(x, low, high, color=RAW, alpha=0.25, label="two standard errors")
    angle.plot(x, angles, ".", color=RAW, markersize=3, label="each window")
    for g in range(groups or 1):
        records = [_of_group(r, g) for r in readings] if groups else readings
        label = f"group {g}, smoothed" if groups else "smoothed (starts over after a drop)"
        style: dict[str, Any] = {**line_style(g), "marker": ".", "markersize": 4.5, "label": label}
        angle.plot(x, column(records, "smoothed"), **style)
        color = line_style(g)["color"]
        dropped = [bool(r.get("dropped")) for r in records]
        rises = column(records, "rise")
        _draw_points(rise, x, rises, dropped, color, color if groups else DROP, named=g == 0)
    rise.plot(
        x, column(readings, "threshold"), **_DASHED, drawstyle="steps-post", label="threshold"
    )


def _of_group(reading: Record, g: int) -> Record:
    """Return what a param group made of a reading; there may be readings from before the group."""
    if len(reading.get("group_angles") or ()) <= g:
        return {}
    return {
        "smoothed": reading["group_smoothed"][g],
        "rise": reading["group_rises"][g],
        "dropped": g in reading.get("dropped_groups", ()),
    }


def _draw_epochs(panels: Sequence[Axes], x: Sequence[float], readings: Sequence[Record]) -> None:
    angle, change, rate = panels
    name_panel(angle, "Angular velocity", "degrees")
    angle.plot(x, column(readings, "angle"), color=OWN, marker=".", markersize=4.5)
    name_panel(change, "Its change: why the rate drops", "degrees\nper epoch")
    changes, limits = column(readings, "change"), column(readings, "threshold")
    met = [r.get("waited") == 0 for r in readings]
    _draw_points(change, x, changes, met, OWN, DROP, ("not met", "condition met"))
    change.plot(x, limits, **_DASHED, drawstyle="steps-mid", label="threshold")
    log_if_wide(change, [*changes, *limits])
    delay: dict[str, Any] = {"color": "#b8860b", "alpha": 0.12, "linewidth": 0, "gid": "delay"}
    for axes in panels:
        for epoch, reading in zip(x, readings, strict=True):
            if reading.get("waited"):
                axes.axvspan(epoch - 1, epoch, **delay)
    rate.fill_between([], [], color=delay["color"], alpha=0.25, label="delay before a drop")


def _draw_points(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    marked: Sequence[bool],
    color: str,
    color_of_marked: str,
    names: tuple[str, str] = ("kept", "dropped"),
    *,
    named: bool = True,
) -> None:
    """Draw circles, and triangles where ``marked``; ``names`` are those of both in the legend."""
    for mine, shape, own, label in (
        (False, "o", color, names[0]),
        (True, "v", color_of_marked, names[1]),
    ):
        at = [i for i, other in enumerate(marked) if other == mine]
        style: dict[str, Any] = {"color": own, "markersize": 4, "gid": label}
        label = label if named else ""
        axes.plot([x[i] for i in at], [y[i] for i in at], shape, label=label, **style)


def _draw_growing_windows(
    panels: Sequence[Axes], x: Sequence[float], readings: Sequence[Record], critical: Any
) -> None:
    cosine, power, rate = panels[-3:]
    name_panel(cosine, "Cosine of the angle: why the rate falls", "cosine")
    cosine.plot(x, column(readings, "cosine"), ".", color=RAW, markersize=4, label="window")
    cosine.plot(x, column(readings, "mean_cosine"), **line_style(0), label="mean")
    if critical is not None:
        cosine.axhline(critical, **_DASHED, label=f"critical {critical:g}")
    name_panel(power, "Exponent p: the rate falls as step$^{-p}$", "exponent")
    power.plot(x, column(readings, "power"), color=OWN, linewidth=1.4, drawstyle="steps-pre")
    power.set_ylim(bottom=0)
    lengths = column(readings, "window_steps")
    doubled = [x[i] for i in range(1, len(x)) if lengths[i] > lengths[i - 1]]
    if doubled:
        note = f"window doubles, from {lengths[0]:,.0f} to {lengths[-1]:,.0f} steps (grey lines)"
        mark(panels, doubled, note, RAW)
    log_steps(rate)


def _draw_rates(axes: Axes, x: Sequence[float], readings: Sequence[Record]) -> None:
    """Draw the learning rate of every param group; groups with equal rates share a line.

    Up to four lines are named. The first readings may have fewer groups than the last.
    """
    name_panel(axes, "Learning rate", "learning rate")
    rows: list[Sequence[Any]] = [r.get("lr") or () for r in readings]
    lines: dict[tuple[Any, ...], list[int]] = {}
    for g in range(max(map(len, rows))):
        rates = tuple(row[g] if len(row) > g else None for row in rows)
        lines.setdefault(rates, []).append(g)
    everything: list[float] = []
    for i, (rates, groups) in enumerate(lines.items()):
        values = column([{"lr": rate} for rate in rates], "lr")
        everything += values
        label = f"param group{'s' if len(groups) > 1 else ''} {', '.join(map(str, groups))}"
        named: dict[str, Any] = {"label": label} if 1 < len(lines) <= 4 else {}
        axes.plot(x, values, **line_style(i), **named, drawstyle="steps-post", zorder=3)
    log_if_wide(axes, everything)
