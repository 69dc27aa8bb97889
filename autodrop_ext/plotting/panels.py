"""Panels of a picture, one above the other, over a common axis of steps or epochs."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Record = Mapping[str, Any]
"""One line of a log: a reading (``Decision.as_dict()``) or metrics (``step`` and values)."""

RAW = "0.6"  # Measured values are grey, and what is computed from them has a colour.
OWN = "#1f5fa8"
LIMIT = "#222222"
DROP = "#c8321e"
DELAY = "#b8860b"
FAINT: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.25}  # of values behind their running mean

# Lines differ in colour and in dashes, so that they can be told apart without seeing colours. Red
# is left to drops.
_COLORS = (OWN, "#c9820a", "#2f8f5b", "#7b4fa3", "#d1578f", "#1497ad", "#7a5230", "#5c6370")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)))

# Axes of larger numbers overflow, and so do logarithmic ones of smaller numbers than its inverse.
# Angles, rates and losses are far from both.
_LARGEST = 1e100
_MEANS = 40  # A running mean covers this part of a run.
_TITLE = 95  # characters of a row of the title
_LEGEND = 110  # characters of a row of the legend of the whole picture


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
    lines: Mapping[str, Line2D] | None = None,
) -> Figure:
    """Add legends, the name of the x-axis and a title, and save the picture if there is a path.

    Each panel has a legend of its labelled lines, and the picture one of the ``lines`` by name
    that all panels share. The ending of the path gives the format.
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
                ncols=len(handles),
                frameon=False,
                fontsize="small",
                borderaxespad=0.1,
                handlelength=1.8,
                columnspacing=1.4,
            )
    if lines:
        legend = figure.legend(
            list(lines.values()),
            list(lines),
            loc="outside lower left" if title else "outside upper left",  # no room for both
            ncols=max(1, min(len(lines), _LEGEND // (max(map(len, lines)) + 8))),
            handlelength=3.2,
            frameon=False,
            fontsize="small",
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # A name with two dollar signs is no formula.
    panels[-1].set_xlabel(xlabel)
    figure.align_ylabels()
    if title:
        # matplotlib's own wrapping would read dollar signs as a formula all the same.
        figure.suptitle(_wrapped(title), fontsize="large", parse_math=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _wrapped(title: str) -> str:
    """Return rows that end at commas, semicolons and colons if such rows are short enough."""
    together = re.sub(r"(?<![,;:]) ", "\xa0", title)
    rows = textwrap.wrap(together, _TITLE, break_long_words=False)
    if any(len(row) > _TITLE for row in rows):
        return textwrap.fill(title, _TITLE)
    return "\n".join(rows).replace("\xa0", " ")


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


def mean(values: Sequence[float]) -> float:
    """Return the mean of the finite values, NaN if there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def running_mean(
    steps: Sequence[float], values: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return steps, and the mean of the values around each: about a 40th of the run, at least 3.

    The mean is centred, and runs over fewer values at both ends. Of long runs about a thousand
    steps are returned, which is more than a picture shows.
    """
    half = max(1, len(values) // _MEANS // 2)
    at = range(0, len(values), max(1, len(values) // 1000))
    return [steps[i] for i in at], [mean(values[max(0, i - half) : i + half + 1]) for i in at]


def line_style(i: int) -> dict[str, Any]:
    """Return matplotlib's arguments for the i-th line of a panel; the first 32 are different."""
    turns, color = divmod(i, len(_COLORS))
    dashes = _DASHES[(i + turns) % len(_DASHES)]
    return {"color": _COLORS[color], "linestyle": dashes, "linewidth": 1.4}


def log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Make the y-axis logarithmic if a linear one would hide the small values."""
    finite = [v for v in values if math.isfinite(v)]
    if finite and min(finite) > 1 / _LARGEST and max(finite) > 5 * min(finite):
        log_scale(axes, min(finite), max(finite))


def log_scale(axes: Axes, lowest: float, highest: float) -> None:
    """Make the y-axis logarithmic, with plain numbers that do not run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    decades = math.log10(highest / lowest)
    if decades < 0.6:  # up to a factor of 4 there would be one or two powers of ten, 2s and 5s
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        subs = (1, 2, 5) if decades < 2 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def log_steps(axes: Axes) -> None:
    """Make the x-axis a logarithmic one of steps."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
