"""The papers' theory figures: Figures 1, 2, 4 and 5 of UAI 2024 (1, 3, 4 and 5 of 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autodrop_ext.plotting.panels import (
    LIMIT,
    OWN,
    finish,
    line_style,
    log_if_wide,
    make_panels,
    mark_drops,
    name_panel,
)
from autodrop_ext.velocity_model import VelocityModel

from .algorithm_2 import Phase
from .quadratic import NoisyQuadratic, Trajectory

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AVERAGE = 20  # iterations that the papers average the angle over
_POINTS = 400  # of a model's curve
_OWN = LIMIT


def plot_constant_rates(
    quadratic: NoisyQuadratic,
    runs: Mapping[float, Trajectory],
    *,
    path: str | Path | None = None,
) -> Figure:
    """Loss and angular velocity at constant rates (UAI 2024, Figure 1), with Theorem 3.2's limits.

    Args:
        quadratic: what was run.
        runs: by learning rate; means over their runs are drawn.
        path: where to save the picture; its ending gives the format.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
    """
    figure, (loss, angle) = _panels(2)
    name_panel(loss, "Loss without noise, $L(x_t) - L(x^*)$", "loss")
    name_panel(angle, f"Angular velocity, mean of {_AVERAGE} iterations", "degrees")
    _band(angle)
    for i, (lr, run) in enumerate(runs.items()):
        style = line_style(i)
        mean = run.loss.mean(dim=0)
        loss.plot(range(len(mean)), mean, **style, label=f"rate {lr:g}")
        limits = quadratic.limits(lr)
        for axes, limit in ((loss, limits.loss), (angle, limits.angle)):
            axes.axhline(limit, color=style["color"], linewidth=0.8, alpha=0.6)
        smooth = run.smoothed_angle(_AVERAGE).mean(dim=0)
        angle.plot(_iterations(smooth), smooth, **style)
    loss.set_xscale("log")
    loss.set_xlim(1, len(mean) - 1)
    loss.set_yscale("log")
    loss.plot([], [], color=LIMIT, linewidth=0.8, alpha=0.6, label="limit (Theorem 3.2)")
    title = "Noisy quadratic model at constant rates"
    return finish(figure, [loss, angle], path, title, xlabel="iteration")


def plot_automatic_drop(
    dropped: Trajectory,
    constant: Mapping[float, Trajectory],
    *,
    path: str | Path | None = None,
) -> Figure:
    """Loss, angular velocity and rate under automatic drops (UAI 2024, Figure 2).

    Args:
        dropped: The runs with automatic drops. Loss and angle are means over them, as those of the
            constant rates; the rate of every run is a thin line, because runs drop at different
            iterations, and the thick one is the geometric mean.
        constant: The runs at constant rates, by rate.
        path: The picture; its ending gives the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, (loss, angle, rate) = _panels(3)
    name_panel(loss, "Loss without noise, $L(x_t) - L(x^*)$", "loss")
    name_panel(angle, f"Angular velocity, mean of {_AVERAGE} iterations", "degrees")
    name_panel(rate, "Learning rate", "learning rate")
    _band(angle, every=10)
    mean = dropped.loss.mean(dim=0)
    loss.plot(range(len(mean)), mean, color=_OWN, linewidth=2, label="automatic", zorder=3)
    for i, (lr, run) in enumerate(constant.items()):
        style = line_style(i)
        mean = run.loss.mean(dim=0)
        loss.plot(range(len(mean)), mean, **style, label=f"rate {lr:g}")
    smooth = dropped.smoothed_angle(_AVERAGE)
    steps = _iterations(smooth[0])
    angle.plot(steps, smooth[0], color="0.7", linewidth=0.9, label="first run")
    angle.plot(steps, smooth.mean(dim=0), color=_OWN, label=f"mean of {len(smooth)} runs")
    for i, lrs in enumerate(dropped.lr):
        label = "each run" if i == 0 else None
        rate.step(range(len(lrs)), lrs, where="post", color="0.7", linewidth=0.7, label=label)
    lrs = dropped.lr.log().mean(dim=0).exp()
    rate.step(range(len(lrs)), lrs, where="post", color=_OWN, label="geometric mean")
    log_if_wide(rate, [float(dropped.lr.min()), float(dropped.lr.max())])
    loss.set_xscale("log")
    loss.set_xlim(1, len(mean) - 1)
    loss.set_yscale("log")
    title = "Noisy quadratic model with automatic drops"
    return finish(figure, [loss, angle, rate], path, title, xlabel="iteration")


def plot_velocity_model(
    model: VelocityModel,
    rates: Sequence[float],
    iterations: int,
    *,
    path: str | Path | None = None,
) -> Figure:
    """``v_lr(t)`` in degrees for several rates (UAI 2024, Figure 4), with its limits.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, (angle,) = _panels(1)
    name_panel(angle, "Angular velocity model", "degrees")
    _band(angle)
    times = torch.linspace(0, iterations, _POINTS, dtype=torch.float64)
    for i, lr in enumerate(rates):
        style = line_style(i)
        angle.axhline(math.degrees(model.limit(lr)), color=style["color"], linewidth=0.8, alpha=0.6)
        values = model.velocity(times, lr).rad2deg()
        angle.plot(times, values, **style, label=f"rate {lr:.3g}")
    angle.plot([], [], color=LIMIT, linewidth=0.8, alpha=0.6, label="limit")
    title = f"Equation (12), gamma = {model.gamma:g}, epsilon = {model.epsilon:g}"
    xlabel = "iterations since the rate was changed"
    return finish(figure, [angle], path, title, xlabel=xlabel)


# ---- parts ----------------------------------------------------------------------------------


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
    _band(angle)
    for phase in phases:
        times = torch.linspace(0, phase.gap, _POINTS, dtype=torch.float64)
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


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Make panels of equal heights, taller than those of a run's pictures."""
    figure, panels = make_panels([1.0] * count)
    figure.set_figheight(1.2 + 2.9 * count)
    return figure, panels


def _band(axes: Axes, every: int = 30) -> None:
    """Draw the band in which angles settle, on an axis of an angle."""
    axes.axhspan(
        90, 120, color="0.5", alpha=0.15, linewidth=0, zorder=0, label="90° to 120°", gid="band"
    )
    axes.set_yticks(range(0, 181, every))


def _iterations(smoothed: Tensor) -> range:
    """Iteration of the newest of the angles that each value is the mean of."""
    return range(_AVERAGE, _AVERAGE + len(smoothed))
