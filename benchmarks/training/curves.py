"""The papers' four panels: learning rate, training loss, error, and the error's end enlarged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OWN = "black"
_ZOOM = 0.6  # the enlarged panel starts after this part of the run
_SPREAD = 3.0  # and ends above the lower half of the errors by this much of their range
_LOWEST_RATE = 1e-4  # of the highest; rates that end at zero would stretch the axis without end


def draw_curves(
    lines: Mapping[str, Sequence[dict[str, Any]]], path: Path, *, title: str, ordered: bool = False
) -> None:
    """Means over seeds against epochs; runs that diverged are left out.

    Args:
        lines: results of the seeds, by the line's name.
        path: of the picture.
        title: above it.
        ordered: the names follow an order; colours then do too.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7), layout="constrained")
    (rate, loss), (error, zoom) = figure.subplots(2, 2)
    colours = colormaps["viridis" if ordered else "tab20"]
    ends: list[tuple[float, list[tuple[float, float]]]] = []
    highest = 0.0
    for i, (name, results) in enumerate(lines.items()):
        own = name.startswith("AutoDrop") and not ordered
        style = {
            "color": _OWN if own else colours(i / len(lines) if ordered else i % 20),
            "linewidth": 2.4 if own else 1.2,
            "linestyle": ("-", "--")[i % 2] if not own else "-",
            "zorder": 4 if own else 3,
        }
        points = {key: _mean(results, key) for key in ("lr", "loss", "error")}
        if not points["error"]:
            continue
        highest = max([highest, *(y for _, y in points["lr"])])
        for axes, key in ((rate, "lr"), (loss, "loss"), (error, "error"), (zoom, "error")):
            axes.plot(*zip(*points[key], strict=True), label=name, **style)
        ends.append((points["error"][-1][1], points["error"]))
    measure = next(iter(lines.values()))[0]["measure"]
    for axes, text, unit in (
        (rate, "Learning rate after each epoch", "learning rate"),
        (loss, "Training loss", "mean loss of the epoch"),
        (error, "Error", measure),
        (zoom, "Error, enlarged", measure),
    ):
        axes.set_title(text, loc="left", fontsize="medium", fontweight="bold")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
    rate.set_yscale("log")
    if highest > 0:
        rate.set_ylim(highest * _LOWEST_RATE, highest * 1.5)
    loss.set_yscale("log")
    _enlarge(zoom, ends)
    handles, names = error.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize="small")
    figure.suptitle(title, fontsize="large")
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def _mean(results: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Mean over those seeds that did not diverge, at each epoch that has a value."""
    values: dict[int, list[float]] = {}
    for result in results:
        if not result["diverged"]:
            for record in result["curve"]:
                if record[key] is not None:
                    values.setdefault(record["epoch"], []).append(record[key])
    return [(epoch, statistics.fmean(v)) for epoch, v in sorted(values.items())]


def _enlarge(axes: Axes, ends: Sequence[tuple[float, list[tuple[float, float]]]]) -> None:
    """The last epochs of the better half of the lines, and what lies not far above."""
    if not ends:
        return
    last = max(points[-1][0] for _, points in ends)
    start = _ZOOM * last
    finals = sorted(end for end, _ in ends)
    lower = finals[: max(2, math.ceil(len(finals) / 2))]
    late = [y for _, points in ends for x, y in points if x >= start]
    bottom = min(late)
    span = max(lower[-1] - bottom, 0.02 * abs(bottom), 1e-9)
    axes.set_xlim(start, last)
    axes.set_ylim(bottom - 0.1 * span, bottom + _SPREAD * span)
