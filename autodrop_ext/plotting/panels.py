"""Panels of a picture, one above the other, over a common axis of steps or epochs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
"""One line of a log: a reading (``Decision.as_dict()``) or metrics (``step`` and values)."""

RAW = "0.6"  # Measured values are grey, and what is computed from them has a colour.
OWN = "#1f5fa8"
LIMIT = "#222222"
DROP = "#c8321e"

# Lines differ in colour and in dashes, so that they can be told apart without seeing colours. Red
# is left to drops.
_COLORS = (OWN, "#c9820a", "#2f8f5b", "#7b4fa3", "#d1578f", "#1497ad", "#7a5230", "#5c6370")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)))

# Axes of larger numbers overflow, and so do logarithmic ones of smaller numbers than its inverse.
# Angles, rates and losses are far from both.
_LARGEST = 1e100


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


def name_panel(axes: Axes, text: str, unit: str) -> None:
    """Write the panel's name above it, to the left, and the unit next to its y-axis."""
    axes.set_title(text, loc="left", fontsize="medium", fontweight="bold")
    axes.set_ylabel(unit)


def finish(
    figure: Figure,
    panels: Sequence[Axes],
    path: str | Path | None,
    title: str | None,
    xlabel: str = "optimizer step",
) -> Figure:
    """Add legends, the name of the x-axis and a title, and save the picture if there is a path.

    The ending of the path gives the format.
    """
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            # The legend is above the panel, because inside it would cover data in some runs.
            axes.legend(
                loc="lower right",
                bbox_to_anchor=(1.0, 1.0),
                ncols=len(handles) if len(handles) <= 4 else (len(handles) + 1) // 2,
                frameon=False,
                fontsize="small",
                borderaxespad=0.1,
                handlelength=1.8,
                columnspacing=1.4,
            )
    panels[-1].set_xlabel(xlabel)
    figure.align_ylabels()
    if title:
        # matplotlib's own wrapping would read dollar signs as a formula all the same.
        figure.suptitle(textwrap.fill(title, 95), fontsize="large", parse_math=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def mark(panels: Sequence[Axes], at: Sequence[float], note: str, color: str = DROP) -> None:
    """Draw thin lines through all panels, and name them in the legend of the last one."""
    # Many lines next to each other would hide the data.
    alpha = 0.6 if len(at) <= 10 else 0.35 if len(at) <= 40 else 0.22
    style: dict[str, Any] = {"color": color, "linewidth": 0.7, "alpha": alpha, "zorder": 1}
    for axes in panels:
        axes.vlines(at, 0, 1, transform=axes.get_xaxis_transform(), gid="marks", **style)
    panels[-1].plot([], [], color=color, linewidth=1, alpha=0.8, label=note)


def mark_drops(panels: Sequence[Axes], at: Sequence[float]) -> None:
    """Mark every drop by a red line."""
    times = "once" if len(at) == 1 else f"{len(at)} times"
    mark(panels, at, f"rate dropped {times} (red lines)" if at else "rate never dropped")


def draw_losses(
    axes: Axes,
    losses: Mapping[str, Sequence[Record]],
    styles: Mapping[str, dict[str, Any]],
    *,
    growing: bool = False,
) -> None:
    """Draw the running mean of each run's loss in its style, and the values as thin lines."""
    name_panel(axes, "Training loss, running mean", "loss")
    everything: list[float] = []
    for name, metrics in losses.items():
        with_loss = [m for m in metrics if "loss" in m]
        steps, values = column(with_loss, "step"), column(with_loss, "loss")
        everything += values
        axes.plot(steps, values, color=styles[name]["color"], linewidth=0.6, alpha=0.25)
        axes.plot(*running_mean(steps, values, growing=growing), **styles[name])
    log_if_wide(axes, everything)


def number(value: Any) -> float:
    """Return a value of a record as a float: NaN if there is none or no axis can show it."""
    try:
        found = math.nan if value is None else float(value)
    except OverflowError:  # an integer that no float can hold
        return math.nan
    return found if abs(found) < _LARGEST else math.nan


def column(records: Sequence[Record], key: str) -> list[float]:
    """Return the values of a key, and NaN if there is none: matplotlib leaves a gap there."""
    return [number(r.get(key)) for r in records]


def running_mean(
    steps: Sequence[float], values: Sequence[float], *, growing: bool = False
) -> tuple[list[float], list[float]]:
    """Return steps, and the mean of the finite values around each: of about a 40th of the run.

    With ``growing`` a mean covers a tenth of the values so far, as it should on a logarithmic axis.
    It covers three at least. Of long runs about a thousand steps are returned.
    """
    count = len(values)
    at = list(range(0, count, max(1, count // 1000)))
    if growing:
        at = (np.unique(np.geomspace(1, count, 1000).astype(int)) - 1).tolist()
    means: list[float] = []
    for i in at:
        half = max(1, i // 20 if growing else count // 80)
        finite = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return [steps[i] for i in at], means


def line_style(i: int) -> dict[str, Any]:
    """Return matplotlib's arguments for the i-th line of a panel; the first 32 are different."""
    turns, color = divmod(i, len(_COLORS))
    dashes = _DASHES[(i + turns) % len(_DASHES)]
    return {"color": _COLORS[color], "linestyle": dashes, "linewidth": 1.4}


def log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Make the y-axis logarithmic if a linear one would hide the small values."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    finite = [v for v in values if math.isfinite(v)]
    if not finite or min(finite) < 1 / _LARGEST or max(finite) < 5 * min(finite):
        return
    axes.set_yscale("log")
    subs = (1, 2, 5) if max(finite) < 100 * min(finite) else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def log_steps(axes: Axes) -> None:
    """Make the x-axis a logarithmic one of steps."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
