"""The papers' panels: learning rate, training loss, test loss, error, and the error enlarged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodrop_ext.plotting.panels import log_if_wide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By the measure: what it is called, and the loss on data that were not trained on. A translator's
# loss is that of the validation sentences, its BLEU that of the test's.
_OTHER_NAMES = {"100 - BLEU": ("Distance from 100 BLEU", "Validation loss")}
_OWN = "black"
_ZOOM = 0.6  # the enlarged panel starts after this part of the run
_SPREAD = 3.0  # and ends above the lower half of the errors by this much of their range
_LOWEST_RATE = 1e-4  # of the highest; rates that end at zero would stretch the axis without end
# Distinct in hue and in lightness, so that they stay apart in grey and for colour-blind readers.
_DISTINCT = ("#1f5fa8", "#c8321e", "#3a8a5f", "#b8860b", "#7b4fa3", "#00a0b0", "#8c564b")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (3, 1)))


def draw_curves(
    lines: Mapping[str, Sequence[dict[str, Any]]], path: Path, *, title: str, ordered: bool = False
) -> None:
    """Means over seeds against epochs; runs that diverged are left out.

    The panel of the test loss is there where all runs have one; results of older runs have none.

    Args:
        lines: results of the seeds, by the line's name.
        path: of the picture.
        title: above it.
        ordered: the names follow an order; colours then do too.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn = [results for results in lines.values() if _mean(results, "error")]
    tested = bool(drawn) and all(_mean(results, "test_loss") for results in drawn)
    figure = Figure(figsize=(15, 7) if tested else (11, 7), layout="constrained")
    grid = figure.subplots(2, 3 if tested else 2)
    rate, loss = grid[0, :2]
    error, zoom = grid[1, :2]
    measure = next(iter(lines.values()))[0]["measure"]
    what, held_out = _OTHER_NAMES.get(measure, ("Error", "Test loss"))
    panels = [
        (rate, "lr", "Learning rate after each epoch", "learning rate"),
        (loss, "loss", "Training loss", "mean loss of the epoch"),
        (error, "error", what, measure),
        (zoom, "error", f"{what}, enlarged", measure),
    ]
    if tested:
        panels.append((grid[0, 2], "test_loss", held_out, "mean loss after the epoch"))
    colours = colormaps["viridis" if ordered else "tab20"]
    ends: list[tuple[float, list[tuple[float, float]]]] = []
    values: dict[str, list[float]] = {key: [] for _, key, _, _ in panels}
    # The only line of AutoDrop among others stands out; several of them differ in colour.
    ours = [name for name in lines if name.startswith("AutoDrop")]
    alone = ours[0] if len(ours) == 1 and not ordered else None
    for i, (name, results) in enumerate(lines.items()):
        own = name == alone
        style = {
            "color": _OWN
            if own
            else colours(i / len(lines))
            if ordered
            else _DISTINCT[i]
            if len(lines) <= len(_DISTINCT)
            else colours(i % 20),
            "linewidth": 2.4 if own else 1.4,
            "linestyle": "-" if own else ("-", "--")[i % 2],
            "zorder": 4 if own else 3,
        }
        points = {key: _mean(results, key) for _, key, _, _ in panels}
        if not points["error"]:
            continue
        for axes, key, _, _ in panels:
            values[key] += [y for _, y in points[key]]
            if points[key]:
                axes.plot(*zip(*points[key], strict=True), label=name, **style)
        ends.append((points["error"][-1][1], points["error"]))
    for axes, _, text, unit in panels:
        _name(axes, text, unit)
    positive = [lr for lr in values["lr"] if lr > 0]
    if positive:
        highest = max(positive)
        lowest = max(min(positive), highest * _LOWEST_RATE)
        log_if_wide(rate, [lowest, highest])
        rate.set_ylim(lowest / 1.5, highest * 1.5)
    for axes, key, _, _ in panels:
        if key.endswith("loss"):
            log_if_wide(axes, values[key])
    _enlarge(zoom, ends)
    handles, names = error.get_legend_handles_labels()
    if tested:  # the sixth place is the legend's
        grid[1, 2].axis("off")
        grid[1, 2].legend(handles, names, loc="center left", frameon=False, fontsize="small")
    else:
        figure.legend(handles, names, loc="outside right center", frameon=False, fontsize="small")
    _save(figure, path, title)


def draw_rates(
    lines: Mapping[str, Sequence[dict[str, Any]]], path: Path, *, title: str, angles: str = "angles"
) -> None:
    """Training loss and measured angles against epochs, one line for each rate.

    Both papers' picture of ResNet-18 at five constant rates (UAI 2024, Figure 3; 2021, Figure 2):
    the angles are those between the displacements of epochs, not smoothed.

    Args:
        lines: results of the seeds, by the line's name; of several seeds means are drawn.
        path: of the picture.
        title: above it.
        angles: which of the results' angles are drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    loss, angle = figure.subplots(2, 1, sharex=True)
    drawn: list[float] = []
    for i, (name, results) in enumerate(lines.items()):
        style = {
            "color": _DISTINCT[i % len(_DISTINCT)],
            "linestyle": _DASHES[i % len(_DASHES)],
            "linewidth": 1.6,
        }
        losses, measured = _mean(results, "loss"), _mean_angles(results, angles)
        drawn += [y for _, y in losses]
        for axes, points in ((loss, losses), (angle, measured)):
            if points:
                axes.plot(*zip(*points, strict=True), label=name, **style)
    _name(loss, "Training loss", "mean loss of the epoch")
    _name(angle, "Angular velocity of epochs", "degrees")
    loss.set_xlabel("")
    log_if_wide(loss, drawn)
    handles, names = loss.get_legend_handles_labels()
    # Next to the panels: a row above them would squeeze them where names are many or long.
    figure.legend(handles, names, loc="outside right center", frameon=False)
    _save(figure, path, title)


def draw_bars(
    groups: Mapping[str, Mapping[str, float]], path: Path, *, title: str, unit: str
) -> None:
    """One bar for each name, side by side in groups (2021, Figure 7).

    Args:
        groups: heights by the bar's name, by the group's name.
        path: of the picture.
        title: above it.
        unit: of the heights.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        bars = [(g, values[name]) for g, values in enumerate(groups.values()) if name in values]
        places = [g + (i - (len(names) - 1) / 2) * width for g, _ in bars]
        heights = [height for _, height in bars]
        drawn = axes.bar(places, heights, width, label=name, color=_DISTINCT[i % len(_DISTINCT)])
        axes.bar_label(drawn, fmt="%.0f", fontsize="small")
    axes.set_xticks(range(len(groups)), list(groups), fontsize="small")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    _save(figure, path, title)


def _name(axes: Axes, text: str, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(text, loc="left", fontsize="medium", fontweight="bold")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize="large")
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def _mean_angles(results: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Mean angle over the seeds, against epochs."""
    values: dict[float, list[float]] = {}
    for result in results:
        for step, angle in result.get(key, ()):
            if angle is not None:
                values.setdefault(step / result["steps_per_epoch"], []).append(angle)
    return [(epoch, statistics.fmean(v)) for epoch, v in sorted(values.items())]


def _mean(results: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Mean over those seeds that did not diverge, at each epoch that has a value."""
    values: dict[int, list[float]] = {}
    for result in results:
        if not result["diverged"]:
            for record in result["curve"]:
                if record.get(key) is not None:
                    values.setdefault(record["epoch"], []).append(record[key])
    return [(epoch, statistics.fmean(v)) for epoch, v in sorted(values.items())]


def _enlarge(axes: Axes, ends: Sequence[tuple[float, list[tuple[float, float]]]]) -> None:
    """The last epochs of the better half of the lines, and what is not far above."""
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
