"""Pictures of a run: when a learning rate dropped, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
"""One line of a log: a reading (``Decision.as_dict()``) or metrics (``step`` and values)."""

_RAW = "0.6"  # greys for what was measured, colours for what was made of it
Dashes = str | tuple[float, Sequence[float]]
_OWN = "#1f5fa8"
_LIMIT = "#222222"
_DROP = "#c8321e"
# The schedules that a run is compared with: told apart by colour and by dashes.
_OTHERS: tuple[tuple[str, Dashes], ...] = (
    ("#b8860b", (0, (4, 1.5))),
    ("#3a8a5f", (0, (1, 1))),
    ("#7b4fa3", (0, (6, 1, 1, 1))),
)


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
    below the threshold.

    Args:
        readings: dicts of ``Decision.as_dict()``, or the readings of ``read_log``.
        metrics: dicts with ``step`` and ``loss``, or the metrics of ``read_log``. Without a loss
            among them there is no panel for it.
        threshold: of the scheduler, degrees per window; drawn where given.
        path: where to save the picture; its ending gives the format.
        title: above the picture.

    Returns:
        The figure, which belongs to no window and to no ``pyplot`` state.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: there are no readings.
    """
    losses = {"loss": metrics} if any(m.get("loss") is not None for m in metrics) else {}
    return _draw(readings, losses, {}, threshold, path, title)


def plot_comparison(
    readings: Sequence[Record],
    runs: Mapping[str, Sequence[Record]],
    *,
    own: str = "AutoDrop",
    threshold: float | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """As :func:`plot_run`, with the losses and learning rates of other schedules beside it.

    Args:
        readings: of the AutoDrop run.
        runs: for each schedule by name its metrics: dicts with ``step``, ``loss`` and ``lr``.
        own: the name in ``runs`` of the run that the readings belong to.
        threshold: degrees per window; drawn where given.
        path: where to save the picture; its ending gives the format.
        title: above the picture.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: there are no readings, or ``own`` is not among the runs.
    """
    if own not in runs:
        raise ValueError(f"own: expected one of {sorted(runs)}, got {own!r}")
    losses = {own: runs[own]} | dict(runs)
    rates = {name: metrics for name, metrics in runs.items() if name != own}
    return _draw(readings, losses, rates, threshold, path, title)


def _draw(
    readings: Sequence[Record],
    losses: Mapping[str, Sequence[Record]],
    rates: Mapping[str, Sequence[Record]],
    threshold: float | None,
    path: str | Path | None,
    title: str | None,
) -> Figure:
    if not readings:
        raise ValueError(
            "readings: expected at least one, got none; the first comes at the end of the third "
            "window"
        )
    heights = [1.2, 1.2, 1.2, 1.0] if losses else [1.2, 1.2, 1.0]
    figure, panels = make_panels(heights)
    angle, rise, rate = panels[-3:]
    if losses:
        _draw_losses(panels[0], losses)
    _draw_angle(angle, readings)
    _draw_rise(rise, readings, threshold)
    _draw_rates(rate, readings, rates)
    _mark_drops(panels, readings)
    finish(figure, panels, path, title)
    return figure


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib: pip install 'autodrop_ext[plot]'", name="matplotlib"
        ) from error
    return Figure


def make_panels(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of panels of these heights, one above the other."""
    figure = _figure_class()(figsize=(9, 2.35 * len(heights)), layout="constrained")
    grid = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    return figure, list(grid[:, 0])


def finish(
    figure: Figure, panels: Sequence[Axes], path: str | Path | None, title: str | None
) -> None:
    """Legends, the axis below, a title; and save the picture where a path is given."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        # Above the panel: inside it would cover data somewhere in every run.
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            axes.legend(
                loc="lower right",
                bbox_to_anchor=(1.0, 1.0),
                ncols=len(handles),
                frameon=False,
                fontsize="small",
                borderaxespad=0.1,
                handlelength=1.6,
                columnspacing=1.4,
            )
    panels[-1].set_xlabel("optimizer step")
    if title:
        figure.suptitle(title, fontsize="large")
    if path is not None:
        figure.savefig(path, dpi=150)


def column(records: Sequence[Record], key: str) -> list[float]:
    """Values of a key, NaN where there is none: matplotlib leaves a gap there."""
    return [math.nan if r.get(key) is None else float(r[key]) for r in records]


def steps_of(records: Sequence[Record]) -> list[float]:
    """Optimizer steps of records."""
    return [float(r["step"]) for r in records]


def line_style(i: int) -> tuple[str, Dashes]:
    """Colour and dashes of the i-th line of a panel; the run's own is the first.

    The next nine are all different.
    """
    if i == 0:
        return _OWN, "-"
    turns, other = divmod(i - 1, len(_OTHERS))
    return _OTHERS[other][0], _OTHERS[(other + turns) % len(_OTHERS)][1]


def name_panel(axes: Axes, text: str) -> None:
    """Write a panel's name above it, to the left."""
    axes.set_title(text, loc="left", fontsize="medium", fontweight="bold")


def log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where it can be and where a linear one would hide the small values."""
    finite = [v for v in values if math.isfinite(v)]
    if finite and min(finite) > 0 and max(finite) > 5 * min(finite):
        _log_scale(axes, min(finite), max(finite))


def _log_scale(axes: Axes, lowest: float, highest: float) -> None:
    """A logarithmic axis with plain numbers, few enough not to run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    decades = math.log10(highest / lowest)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_losses(axes: Axes, losses: Mapping[str, Sequence[Record]]) -> None:
    name_panel(axes, "Training loss")
    everything: list[float] = []
    for i, (name, metrics) in enumerate(losses.items()):
        # A log may mix records of a loss with records of other values.
        with_loss = [m for m in metrics if "loss" in m]
        values = column(with_loss, "loss")
        everything += values
        color, dashes = line_style(i)
        axes.plot(
            steps_of(with_loss),
            values,
            color=color,
            linestyle=dashes,
            linewidth=1.4,
            label=name if len(losses) > 1 else None,
            zorder=3 if i == 0 else 2.5,
        )
    log_if_wide(axes, everything)
    axes.set_ylabel("loss")


def _draw_angle(axes: Axes, readings: Sequence[Record]) -> None:
    name_panel(axes, "Angular velocity")
    steps = steps_of(readings)
    angles, margins = column(readings, "angle"), column(readings, "margin")
    if any(margin > 0 for margin in margins):
        axes.fill_between(
            steps,
            [a - m for a, m in zip(angles, margins, strict=True)],
            [a + m for a, m in zip(angles, margins, strict=True)],
            color=_RAW,
            alpha=0.3,
            linewidth=0,
            label="95 % interval (sampled)",
        )
    axes.plot(steps, angles, ".", color=_RAW, markersize=3, label="each window")
    groups = by_group(readings)
    for g, records in enumerate(groups or [readings]):
        color, dashes = line_style(g)
        axes.plot(
            *smoothed_line(records),
            color=color,
            linestyle=dashes,
            linewidth=1.6,
            marker=".",
            markersize=4.5,
            label=f"group {g}, smoothed" if groups else "smoothed (starts over after a drop)",
        )
    axes.set_ylabel("degrees")


def by_group(readings: Sequence[Record]) -> list[list[Record]]:
    """Of param groups that decide for themselves, the records of each; empty where they do not."""
    groups = max((len(r.get("group_angles") or ()) for r in readings), default=0)
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


def smoothed_line(readings: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Steps and smoothed angles, with a gap after every drop.

    A drop empties the buffer: what is smoothed after it is not compared with what was before, so
    the line breaks there even where no reading without a smoothed value lies between.
    """
    steps: list[float] = []
    values: list[float] = []
    for step, value, reading in zip(
        steps_of(readings), column(readings, "smoothed"), readings, strict=True
    ):
        steps.append(step)
        values.append(value)
        if reading.get("dropped"):
            steps.append(step)
            values.append(math.nan)
    return steps, values


def _draw_rise(axes: Axes, readings: Sequence[Record], threshold: float | None) -> None:
    name_panel(axes, "Rise of the smoothed angle: why the rate drops")
    groups = by_group(readings)
    readings = [record for records in groups for record in records] if groups else readings
    kept = [r for r in readings if not r.get("dropped")]
    dropped = [r for r in readings if r.get("dropped")]
    axes.plot(
        steps_of(kept),
        column(kept, "rise"),
        "o",
        color=_OWN,
        markersize=3.5,
        label="rate kept",
    )
    axes.plot(
        steps_of(dropped),
        column(dropped, "rise"),
        "v",
        color=_DROP,
        markersize=4,
        label="rate dropped",
    )
    values = [v for v in column(readings, "rise") if math.isfinite(v)]
    if threshold is not None:
        axes.axhline(
            threshold, color=_LIMIT, linewidth=1, linestyle="--", label=f"threshold {threshold:g}°"
        )
        lowest = min([threshold, *values])
        span = max([threshold, *values]) - lowest or 1.0
        axes.axhspan(lowest - span, threshold, color=_DROP, alpha=0.06, linewidth=0)
        axes.set_ylim(lowest - 0.08 * span, lowest + 1.08 * span)
    axes.set_ylabel("degrees\nper window")


def _draw_rates(
    axes: Axes, readings: Sequence[Record], others: Mapping[str, Sequence[Record]]
) -> None:
    name_panel(axes, "Learning rate")
    steps = steps_of(readings)
    groups = max(len(r.get("lr") or ()) for r in readings)
    everything: list[float] = []
    for group in range(groups):
        rates = [
            float(r["lr"][group]) if len(r.get("lr") or ()) > group else math.nan for r in readings
        ]
        everything += rates
        label = "AutoDrop" if others else f"param group {group}" if 1 < groups <= 4 else None
        color, dashes = line_style(group)
        axes.plot(
            steps,
            rates,
            color=color,
            linestyle=dashes,
            linewidth=1.4,
            drawstyle="steps-post",
            label=label,
            zorder=3,
        )
    for i, (name, metrics) in enumerate(others.items()):
        color, dashes = line_style(i + 1)
        axes.plot(
            steps_of(metrics),
            column(metrics, "lr"),
            color=color,
            linestyle=dashes,
            linewidth=1.4,
            label=name,
        )
    finite = [v for v in everything if math.isfinite(v)]
    if finite and min(finite) > 0:
        _log_scale(axes, min(finite), max(finite))
        # Cosine annealing ends at zero and would stretch the axis without end.
        axes.set_ylim(min(finite) / 1.5, max(finite) * 1.5)
    axes.set_ylabel("learning rate")


def _mark_drops(panels: Sequence[Axes], readings: Sequence[Record]) -> None:
    steps = [r["step"] for r in readings if r.get("dropped")]
    # Many lines side by side would grey the data out.
    alpha = 0.6 if len(steps) <= 10 else 0.35 if len(steps) <= 40 else 0.22
    for axes in panels:
        lines = axes.vlines(
            steps,
            0,
            1,
            transform=axes.get_xaxis_transform(),
            color=_DROP,
            linewidth=0.7,
            alpha=alpha,
            zorder=1,
        )
        lines.set_gid("drops")
    times = "once" if len(steps) == 1 else f"{len(steps)} times"
    note = f"rate dropped {times} (red lines, all panels)" if steps else "rate never dropped"
    panels[-1].plot([], [], color=_DROP, linewidth=1, alpha=0.8, label=note)
