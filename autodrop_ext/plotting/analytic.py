"""Picture of Algorithm 2: the modelled angular velocity and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..velocity_model import Phase, VelocityModel
from .panels import OWN, finish, log_if_wide, make_panels, mark_drops, name_panel

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_algorithm_2(
    model: VelocityModel, phases: Sequence[Phase], *, path: str | Path | None = None
) -> Figure:
    """Draw the modelled velocity and the learning rate of Algorithm 2 (UAI 2024, Figure 5).

    Args:
        model: The model of the angular velocity.
        phases: The learning rates so far, each with its first iteration and its number of them.
        path: The picture; its ending gives the format.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
        ValueError: There are no phases.
    """
    if not phases:
        raise ValueError("phases: expected at least one, got none")
    figure, panels = make_panels([1.0, 1.0])
    angle, rate = panels
    name_panel(angle, "Modelled angular velocity", "degrees")
    name_panel(rate, "Learning rate", "learning rate")
    draw_band(angle)
    for phase in phases:
        times = torch.linspace(0, phase.gap, 400, dtype=torch.float64)
        values = model.velocity(times, phase.lr).rad2deg()
        angle.plot(phase.start + times, values, color=OWN)
    angle.set_yticks(range(0, 181, 30))
    starts = [phase.start for phase in phases]
    lrs = [phase.lr for phase in phases]
    end = phases[-1].start + phases[-1].gap
    rate.step([*starts, end], [*lrs, lrs[-1]], where="post", color=OWN)
    log_if_wide(rate, lrs)
    mark_drops(panels, starts[1:])
    title = f"Algorithm 2, gamma = {model.gamma:g}, epsilon = {model.epsilon:g}"
    return finish(figure, panels, path, title, xlabel="iteration")


def draw_band(axes: Axes) -> None:
    """Draw the band of angles in which the velocity settles, 90 to 120 degrees (property P2 i)."""
    axes.axhspan(
        90, 120, color="0.5", alpha=0.15, linewidth=0, zorder=0, label="90° to 120°", gid="band"
    )
