"""Picture of a run of ``EpochAutoDrop``: when the learning rate dropped, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OWN = "#1f5fa8"
_LIMIT = "#222222"
_DROP = "#c8321e"
_DELAY = "#b8860b"


def plot_epochs(
    decisions: Sequence[Mapping[str, Any]], *, path: str | Path | None = None
) -> Figure:
    """Draw angular velocity, its change beside the threshold, and learning rate over epochs.

    Args:
        decisions: dicts of ``EpochDecision.as_dict()``.
        path: where to save the picture; its ending gives the format.

    Returns:
        The figure, which belongs to no window and to no ``pyplot`` state.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: there are no decisions.
    """
    if not decisions:
        raise ValueError("decisions: expected at least one, got none; step() makes one an epoch")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib: pip install 'autodrop_ext[plot]'", name="matplotlib"
        ) from error
    figure = Figure(figsize=(9, 7), layout="constrained")
    angle, change, rate = figure.subplots(3, 1, sharex=True)
    epochs = [float(d["window"]) for d in decisions]
    angle.plot(epochs, _column(decisions, "angle"), color=_OWN, marker=".", markersize=4.5)
    angle.set_title("Angular velocity", loc="left", fontsize="medium", fontweight="bold")
    angle.set_ylabel("degrees")
    _draw_change(change, epochs, decisions)
    _draw_rates(rate, epochs, decisions)
    for axes in (angle, change, rate):
        _mark(axes, epochs, decisions)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            # Above the panel: inside it would cover data somewhere in every run.
            axes.legend(
                loc="lower right",
                bbox_to_anchor=(1.0, 1.0),
                ncols=len(handles),
                frameon=False,
                fontsize="small",
                borderaxespad=0.1,
            )
    rate.set_xlabel("epoch")
    figure.align_ylabels()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _column(decisions: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Values of a key, NaN where there is none: matplotlib leaves a gap there."""
    return [math.nan if d.get(key) is None else float(d[key]) for d in decisions]


def _draw_change(
    axes: Axes, epochs: Sequence[float], decisions: Sequence[Mapping[str, Any]]
) -> None:
    axes.set_title("Its change: why the rate drops", loc="left", fontsize="medium", weight="bold")
    changes = _column(decisions, "change")
    axes.plot(epochs, changes, "o", color=_OWN, markersize=3.5, label="change")
    met = [(e, c) for e, c, d in zip(epochs, changes, decisions, strict=True) if d["waited"] == 0]
    axes.plot(
        [e for e, _ in met],
        [c for _, c in met],
        "v",
        color=_DROP,
        markersize=6,
        label="condition met",
    )
    axes.plot(
        epochs,
        _column(decisions, "threshold"),
        color=_LIMIT,
        linewidth=1,
        linestyle="--",
        drawstyle="steps-mid",
        label="threshold",
    )
    if any(c > 0 for c in changes):
        axes.set_yscale("log")
    axes.set_ylabel("degrees\nper epoch")


def _draw_rates(
    axes: Axes, epochs: Sequence[float], decisions: Sequence[Mapping[str, Any]]
) -> None:
    axes.set_title("Learning rate", loc="left", fontsize="medium", fontweight="bold")
    groups = max(len(d["lr"]) for d in decisions)
    for group in range(groups):
        rates = [d["lr"][group] if len(d["lr"]) > group else math.nan for d in decisions]
        axes.plot(
            epochs,
            rates,
            color=_OWN if group == 0 else None,
            drawstyle="steps-post",
            label=f"param group {group}" if 1 < groups <= 4 else None,
        )
    if all(rate > 0 for d in decisions for rate in d["lr"]):
        axes.set_yscale("log")
    axes.fill_between([], [], color=_DELAY, alpha=0.25, label="delay before a drop")
    axes.plot([], [], color=_DROP, linewidth=1, label="rate dropped")
    axes.set_ylabel("learning rate")


def _mark(axes: Axes, epochs: Sequence[float], decisions: Sequence[Mapping[str, Any]]) -> None:
    """Delays as bands, drops as lines."""
    for epoch, decision in zip(epochs, decisions, strict=True):
        if decision["waited"] is not None and decision["waited"] > 0:
            axes.axvspan(epoch - 1, epoch, color=_DELAY, alpha=0.12, linewidth=0, gid="delay")
        if decision["dropped"]:
            axes.axvline(epoch, color=_DROP, linewidth=0.8, alpha=0.6, gid="drop")
