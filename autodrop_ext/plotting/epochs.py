"""Picture of a run of ``EpochAutoDrop``: when the learning rate dropped, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .curves import draw_rates, mark_drops, panels_of
from .panels import DELAY, DROP, LIMIT, OWN, Record, column, finish, name_panel

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_epochs(
    decisions: Sequence[Record], *, path: str | Path | None = None, title: str | None = None
) -> Figure:
    """Draw the angular velocity, its change with the threshold, and the learning rate over epochs.

    Args:
        decisions: Dicts of ``EpochDecision.as_dict()``.
        path: The picture; its ending gives the format.
        title: The text above the picture.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: There are no decisions.
    """
    figure, panels = panels_of("decisions", decisions, (), [1.0, 1.0, 1.0])
    angle, change, rate = panels
    epochs = column(decisions, "window")
    name_panel(angle, "Angular velocity", "degrees")
    angle.plot(epochs, column(decisions, "angle"), color=OWN, marker=".", markersize=4.5)
    _draw_change(change, epochs, decisions)
    draw_rates(rate, epochs, decisions)
    delay: dict[str, Any] = {"color": DELAY, "alpha": 0.12, "linewidth": 0, "gid": "delay"}
    for axes in panels:
        for epoch, decision in zip(epochs, decisions, strict=True):
            if decision["waited"]:
                axes.axvspan(epoch - 1, epoch, **delay)
    rate.fill_between([], [], color=DELAY, alpha=0.25, label="delay before a drop")
    mark_drops(panels, [e for e, d in zip(epochs, decisions, strict=True) if d["dropped"]])
    return finish(figure, panels, path, title, xlabel="epoch")


def _draw_change(axes: Axes, epochs: Sequence[float], decisions: Sequence[Record]) -> None:
    name_panel(axes, "Its change: why the rate drops", "degrees\nper epoch")
    changes, limits = column(decisions, "change"), column(decisions, "threshold")
    axes.plot(epochs, changes, "o", color=OWN, markersize=3.5, label="change")
    met = [d for d in decisions if d["waited"] == 0]
    met_style: dict[str, Any] = {"color": DROP, "markersize": 6, "label": "condition met"}
    axes.plot(column(met, "window"), column(met, "change"), "v", **met_style)
    line: dict[str, Any] = {"color": LIMIT, "linewidth": 1, "linestyle": "--"}
    axes.plot(epochs, limits, **line, drawstyle="steps-mid", label="threshold")
    if any(change > 0 for change in changes):
        axes.set_yscale("log")
