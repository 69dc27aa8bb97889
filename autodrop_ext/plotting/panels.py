"""What all pictures of runs share: panels, lines, axes, legends, and the marks of drops."""

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

Dashes = str | tuple[float, Sequence[float]]

RAW = "0.6"  # Measured values are grey, and what is computed from them has a colour.
OWN = "#1f5fa8"
LIMIT = "#222222"
DROP = "#c8321e"
DELAY = "#b8860b"
# The lines that a run is compared with differ in colour and in dashes.
_OTHERS: tuple[tuple[str, Dashes], ...] = (
    ("#b8860b", (0, (4, 1.5))),
    ("#3a8a5f", (0, (1, 1))),
    ("#7b4fa3", (0, (6, 1, 1, 1))),
)


def make_panels(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels of these relative heights, one above the other.

    The figure belongs to no window and to no ``pyplot`` state.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib: pip install 'autodrop_ext[plot]'", name="matplotlib"
        ) from error
    figure = Figure(figsize=(9, 2.35 * len(heights)), layout="constrained")
    grid = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    return figure, list(grid[:, 0])


def finish(
    figure: Figure,
    panels: Sequence[Axes],
    path: str | Path | None,
    title: str | None,
    xlabel: str = "optimizer step",
) -> Figure:
    """Add legends, the name of the x-axis and a title, and save the picture if there is a path."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            # The legend is above the panel, because inside it would cover data in some runs.
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
    panels[-1].set_xlabel(xlabel)
    figure.align_ylabels()
    if title:
        figure.suptitle(title, fontsize="large")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def name_panel(axes: Axes, text: str, unit: str) -> None:
    """Write the panel's name above it, to the left, and the unit next to its y-axis."""
    axes.set_title(text, loc="left", fontsize="medium", fontweight="bold")
    axes.set_ylabel(unit)


def column(records: Sequence[Record], key: str) -> list[float]:
    """Return the values of a key, and NaN where there is none: matplotlib leaves a gap there."""
    return [math.nan if r.get(key) is None else float(r[key]) for r in records]


def line_style(i: int) -> dict[str, Any]:
    """Return matplotlib's arguments for the i-th line of a panel; the run's own line is the first.

    The next nine are all different.
    """
    if i == 0:
        return {"color": OWN, "linestyle": "-", "linewidth": 1.4}
    turns, other = divmod(i - 1, len(_OTHERS))
    dashes = _OTHERS[(other + turns) % len(_OTHERS)][1]
    return {"color": _OTHERS[other][0], "linestyle": dashes, "linewidth": 1.4}


def log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Make the y-axis logarithmic if a linear one would hide the small values."""
    finite = [v for v in values if math.isfinite(v)]
    if finite and min(finite) > 0 and max(finite) > 5 * min(finite):
        log_scale(axes, min(finite), max(finite))


def log_scale(axes: Axes, lowest: float, highest: float) -> None:
    """Make the y-axis logarithmic, with plain numbers that do not run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    decades = math.log10(highest / lowest)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_losses(
    axes: Axes, losses: Mapping[str, Sequence[Record]], styles: Mapping[str, dict[str, Any]]
) -> None:
    """Draw one line for each run, in its style; names are in the legend if there are several."""
    name_panel(axes, "Training loss", "loss")
    everything: list[float] = []
    for name, metrics in losses.items():
        # A log may mix records of a loss with records of other values.
        with_loss = [m for m in metrics if "loss" in m]
        values = column(with_loss, "loss")
        everything += values
        label = name if len(losses) > 1 else None
        axes.plot(column(with_loss, "step"), values, **styles[name], label=label)
    log_if_wide(axes, everything)


def draw_rates(
    axes: Axes, x: Sequence[float], readings: Sequence[Record], name: str | None = None
) -> None:
    """Draw the learning rate of every param group as steps, on a logarithmic axis if possible.

    Args:
        axes: the panel.
        x: one value for each reading.
        readings: their ``lr`` has one rate for each param group; groups may come later.
        name: for the legend; without one, two to four groups are numbered there.
    """
    name_panel(axes, "Learning rate", "learning rate")
    groups = max(len(r.get("lr") or ()) for r in readings)
    finite: list[float] = []
    for g in range(groups):
        rates = [float(r["lr"][g]) if len(r.get("lr") or ()) > g else math.nan for r in readings]
        finite += filter(math.isfinite, rates)
        label = name or (f"param group {g}" if 1 < groups <= 4 else None)
        axes.plot(x, rates, **line_style(g), drawstyle="steps-post", label=label, zorder=3)
    if finite and min(finite) > 0:
        log_scale(axes, min(finite), max(finite))
        # Another schedule's rate may end at zero, and would stretch the axis without end.
        axes.set_ylim(min(finite) / 1.5, max(finite) * 1.5)


def mark_drops(panels: Sequence[Axes], at: Sequence[float]) -> None:
    """Draw a thin red line through all panels at every drop, and name them in the last legend."""
    # Many lines next to each other would hide the data.
    alpha = 0.6 if len(at) <= 10 else 0.35 if len(at) <= 40 else 0.22
    for axes in panels:
        axes.vlines(
            at,
            0,
            1,
            transform=axes.get_xaxis_transform(),
            color=DROP,
            linewidth=0.7,
            alpha=alpha,
            zorder=1,
            gid="drops",
        )
    times = "once" if len(at) == 1 else f"{len(at)} times"
    note = f"rate dropped {times} (red lines, all panels)" if at else "rate never dropped"
    panels[-1].plot([], [], color=DROP, linewidth=1, alpha=0.8, label=note)


def smoothed_line(readings: Sequence[Record]) -> tuple[list[float], list[float]]:
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
