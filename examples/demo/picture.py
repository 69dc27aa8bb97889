"""Picture of one run that is read at many lengths, next to runs that were made for a length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autodrop_ext.plotting.panels import (
    Record,
    column,
    finish,
    line_style,
    log_if_wide,
    log_steps,
    make_panels,
    name_panel,
)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_lengths(
    open_runs: Mapping[str, Sequence[Record]],
    runs_of_lengths: Mapping[str, Sequence[Sequence[Record]]],
    measure: str,
    *,
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw quality and learning rate over the optimizer steps, both axes logarithmic.

    A run without a length is a line that may be read anywhere. Of runs that were made for a length,
    one per length, a thin line leads to a ring at the end, where alone they are meant to be read.

    Args:
        open_runs: One run of each schedule that knows no length: dicts with ``step``, ``quality``
            and ``lr``.
        runs_of_lengths: The runs of each schedule that is set for a length.
        measure: What ``quality`` is, lower is better: "test error %".
        path: The picture; its ending gives the format.
        title: The text above the picture.

    Returns:
        The figure, which belongs to no window and to no ``pyplot`` state.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: There are no runs.
    """
    if not open_runs and not runs_of_lengths:
        raise ValueError("open_runs, runs_of_lengths: expected at least one run, got none")
    figure, panels = make_panels([1.6, 1.0])
    quality, rate = panels
    name_panel(quality, f"{measure[0].upper()}{measure[1:]}", measure)
    name_panel(rate, "Learning rate", "learning rate")
    values: dict[Axes, list[float]] = {quality: [], rate: []}
    drawn = {**{name: [run] for name, run in open_runs.items()}, **runs_of_lengths}
    for i, (name, runs) in enumerate(drawn.items()):
        style = line_style(i) | ({} if name in open_runs else {"linewidth": 0.8})
        for axes, key in ((quality, "quality"), (rate, "lr")):
            for j, run in enumerate(runs):
                steps, heights = column(run, "step"), column(run, key)
                if axes is rate:  # a rate of zero would be a vertical line out of the picture
                    steps = [s for s, lr in zip(steps, heights, strict=True) if lr > 0]
                    heights = [lr for lr in heights if lr > 0]
                # Rates that fall to nearly zero do not stretch the axis.
                shown = heights if name in open_runs or axes is quality else heights[:1]
                values[axes] += [v for v in shown if v > 0]
                ring = name not in open_runs and axes is quality
                label = None if j or ring else name
                axes.plot(steps, heights, **style, label=label)
                if ring:
                    axes.plot(
                        steps[-1:],
                        heights[-1:],
                        linestyle="",
                        marker="o",
                        markersize=8,
                        markerfacecolor="none",
                        markeredgewidth=1.6,
                        color=style["color"],
                        label=None if j else f"{name}, set for this length",
                    )
    for axes in panels:
        log_if_wide(axes, values[axes])
    log_steps(rate)
    if values[rate]:
        rate.set_ylim(min(values[rate]) / 3, max(values[rate]) * 1.5)
    return finish(figure, panels, path, title)
