"""Curves of a run: its loss and its learning rates, with a mark at every drop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .panels import (
    DROP,
    FAINT,
    Record,
    column,
    line_style,
    log_if_wide,
    log_scale,
    make_panels,
    name_panel,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Smooth = Callable[[Sequence[float], Sequence[float]], tuple[list[float], list[float]]]
"""Takes steps and values, and returns steps and means."""


def panels_of(
    argument: str,
    readings: Sequence[Record],
    metrics: Sequence[Record],
    heights: Sequence[float],
    smooth: Smooth | None = None,
    how: str = "",
) -> tuple[Figure, list[Axes]]:
    """Make panels of these heights, and one of the loss above them if the metrics hold a loss.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: There are no readings; the message calls them by the name of the argument.
    """
    if not readings:
        raise ValueError(f"{argument}: expected at least one, got none")
    if not any(m.get("loss") is not None for m in metrics):
        return make_panels(heights)
    figure, panels = make_panels([1.2, *heights])
    draw_losses(panels[0], {"": metrics}, {"": line_style(0)}, smooth, how)
    return figure, panels


def draw_losses(
    axes: Axes,
    losses: Mapping[str, Sequence[Record]],
    styles: Mapping[str, dict[str, Any]],
    smooth: Smooth | None = None,
    how: str = "",
) -> None:
    """Draw the loss of each run in its style; metrics may hold records without a loss.

    The means that ``smooth`` returns are drawn, with the values as thin lines behind them, and the
    name of the panel says ``how`` they are made.
    """
    name_panel(axes, f"Training loss{how}", "loss")
    everything: list[float] = []
    for name, metrics in losses.items():
        with_loss = [m for m in metrics if "loss" in m]
        steps, values = column(with_loss, "step"), column(with_loss, "loss")
        everything += values
        if smooth is not None:
            axes.plot(steps, values, color=styles[name]["color"], **FAINT)
            steps, values = smooth(steps, values)
        axes.plot(steps, values, **styles[name])
    log_if_wide(axes, everything)


def draw_rates(axes: Axes, x: Sequence[float], readings: Sequence[Record]) -> None:
    """Draw the learning rate of every param group as steps, on a logarithmic axis if possible.

    Groups whose rates are equal all along share a line; up to four lines are named. The first
    readings may have fewer groups than the last.
    """
    name_panel(axes, "Learning rate", "learning rate")
    rows: list[Sequence[Any]] = [r.get("lr") or () for r in readings]
    lines: dict[tuple[Any, ...], list[int]] = {}
    for g in range(max(map(len, rows))):
        of_group = tuple(row[g] if len(row) > g else None for row in rows)
        lines.setdefault(of_group, []).append(g)
    finite: list[float] = []
    for i, (rates, groups) in enumerate(lines.items()):
        values = column([{"lr": rate} for rate in rates], "lr")
        finite += filter(math.isfinite, values)
        label = f"param group{'s' if len(groups) > 1 else ''} {', '.join(map(str, groups))}"
        named: dict[str, Any] = {"label": label} if 1 < len(lines) <= 4 else {}
        axes.plot(x, values, **line_style(i), **named, drawstyle="steps-post", zorder=3)
    if finite and min(finite) > 1e-100:
        log_scale(axes, min(finite), max(finite))
        # Another schedule's rate may end at zero, and would stretch the axis without end.
        axes.set_ylim(min(finite) / 1.5, max(finite) * 1.5)


def mark_drops(panels: Sequence[Axes], at: Sequence[float]) -> None:
    """Draw a thin red line through all panels at every drop, and name them in the last legend."""
    # Many lines next to each other would hide the data.
    alpha = 0.6 if len(at) <= 10 else 0.35 if len(at) <= 40 else 0.22
    style: dict[str, Any] = {"color": DROP, "linewidth": 0.7, "alpha": alpha, "zorder": 1}
    for axes in panels:
        axes.vlines(at, 0, 1, transform=axes.get_xaxis_transform(), gid="drops", **style)
    times = "once" if len(at) == 1 else f"{len(at)} times"
    note = f"rate dropped {times} (red lines, all panels)" if at else "rate never dropped"
    panels[-1].plot([], [], color=DROP, linewidth=1, alpha=0.8, label=note)
