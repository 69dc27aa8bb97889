"""The papers' theory figures: Figures 1, 2, 4 and 5 of UAI 2024 (1, 3, 4 and 5 of 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .quadratic import NoisyQuadratic, Trajectory
from .velocity_model import Phase, VelocityModel

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AVERAGE = 20  # iterations that the papers average the angle over
_POINTS = 400  # of a model's curve
_BAND = (90.0, 120.0)  # property P2 i: where the angle settles
_LIMIT = _OWN = "#222222"
_DROP = "#c8321e"
# Told apart by colour and by dashes.
_LINES: tuple[tuple[str, str | tuple[float, tuple[float, ...]]], ...] = (
    ("#1f5fa8", "-"),
    ("#b8860b", (0, (4, 1.5))),
    ("#3a8a5f", (0, (1, 1))),
    ("#7b4fa3", (0, (6, 1, 1, 1))),
)


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
    _name(loss, "Loss without noise, $L(x_t) - L(x^*)$")
    _name(angle, f"Angular velocity, mean of {_AVERAGE} iterations")
    _band(angle)
    for i, (lr, run) in enumerate(runs.items()):
        color, dashes = _LINES[i % len(_LINES)]
        mean = run.loss.mean(dim=0)
        loss.plot(range(len(mean)), mean, color=color, linestyle=dashes, label=f"rate {lr:g}")
        limits = quadratic.limits(lr)
        for axes, limit in ((loss, limits.loss), (angle, limits.angle)):
            axes.axhline(limit, color=color, linewidth=0.8, alpha=0.6)
        smooth = run.smoothed_angle(_AVERAGE).mean(dim=0)
        angle.plot(_iterations(smooth), smooth, color=color, linestyle=dashes)
    loss.set_xscale("log")
    loss.set_xlim(1, len(mean) - 1)
    loss.set_yscale("log")
    loss.set_ylabel("loss")
    angle.set_xlabel("iteration")
    loss.plot([], [], color=_LIMIT, linewidth=0.8, alpha=0.6, label="limit (Theorem 3.2)")
    return _finish(figure, (loss, angle), path, "Noisy quadratic model at constant rates")


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
    _name(loss, "Loss without noise, $L(x_t) - L(x^*)$")
    _name(angle, f"Angular velocity, mean of {_AVERAGE} iterations")
    _name(rate, "Learning rate")
    _band(angle, every=10)
    mean = dropped.loss.mean(dim=0)
    loss.plot(range(len(mean)), mean, color=_OWN, linewidth=2, label="automatic", zorder=3)
    for i, (lr, run) in enumerate(constant.items()):
        color, dashes = _LINES[i % len(_LINES)]
        mean = run.loss.mean(dim=0)
        loss.plot(range(len(mean)), mean, color=color, linestyle=dashes, label=f"rate {lr:g}")
    smooth = dropped.smoothed_angle(_AVERAGE)
    steps = _iterations(smooth[0])
    angle.plot(steps, smooth[0], color="0.7", linewidth=0.9, label="first run")
    angle.plot(steps, smooth.mean(dim=0), color=_OWN, label=f"mean of {len(smooth)} runs")
    for i, lrs in enumerate(dropped.lr):
        label = "each run" if i == 0 else None
        rate.step(range(len(lrs)), lrs, where="post", color="0.7", linewidth=0.7, label=label)
    lrs = dropped.lr.log().mean(dim=0).exp()
    rate.step(range(len(lrs)), lrs, where="post", color=_OWN, label="geometric mean")
    _plain_log(rate)
    loss.set_xscale("log")
    loss.set_xlim(1, len(mean) - 1)
    loss.set_yscale("log")
    loss.set_ylabel("loss")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("iteration")
    title = "Noisy quadratic model with automatic drops"
    return _finish(figure, (loss, angle, rate), path, title)


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
    _name(angle, "Angular velocity model")
    _band(angle)
    times = torch.linspace(0, iterations, _POINTS, dtype=torch.float64)
    for i, lr in enumerate(rates):
        color, dashes = _LINES[i % len(_LINES)]
        angle.axhline(math.degrees(model.limit(lr)), color=color, linewidth=0.8, alpha=0.6)
        values = model.velocity(times, lr).rad2deg()
        angle.plot(times, values, color=color, linestyle=dashes, label=f"rate {lr:.3g}")
    angle.plot([], [], color=_LIMIT, linewidth=0.8, alpha=0.6, label="limit")
    angle.margins(x=0.01)
    angle.set_xlabel("iterations since the rate was changed")
    title = f"Equation (12), gamma = {model.gamma:g}, epsilon = {model.epsilon:g}"
    return _finish(figure, (angle,), path, title)


def plot_algorithm_2(
    model: VelocityModel, phases: Sequence[Phase], *, path: str | Path | None = None
) -> Figure:
    """Modelled velocity and learning rate of Algorithm 2 (UAI 2024, Figure 5).

    Args:
        model: of the angular velocity.
        phases: from :func:`~autodrop_ext.theory.algorithm_2`.
        path: where to save the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no phases.
    """
    if not phases:
        raise ValueError("phases: expected at least one, got none")
    figure, (angle, rate) = _panels(2)
    _name(angle, "Modelled angular velocity")
    _name(rate, "Learning rate")
    _band(angle)
    color, dashes = _LINES[0]
    for phase in phases:
        times = torch.linspace(0, phase.gap, _POINTS, dtype=torch.float64)
        values = model.velocity(times, phase.lr).rad2deg()
        angle.plot(phase.start + times, values, color=color, linestyle=dashes)
    starts = [phase.start for phase in phases]
    end = phases[-1].start + phases[-1].gap
    lrs = [phase.lr for phase in phases]
    rate.step([*starts, end], [*lrs, lrs[-1]], where="post", color=color, linestyle=dashes)
    _plain_log(rate)
    _mark_drops((angle, rate), starts[1:])
    angle.margins(x=0.01)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("iteration")
    title = f"Algorithm 2, gamma = {model.gamma:g}, epsilon = {model.epsilon:g}"
    return _finish(figure, (angle, rate), path, title)


# ---- parts ----------------------------------------------------------------------------------


def _panels(count: int) -> tuple[Figure, tuple[Axes, ...]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib: pip install 'autodrop_ext[plot]'", name="matplotlib"
        ) from error
    figure = Figure(figsize=(9, 1.2 + 2.9 * count), layout="constrained")
    return figure, tuple(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _name(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize="medium", fontweight="bold")


def _band(axes: Axes, every: int = 30) -> None:
    """Where angles settle (property P2 i), and the axis of an angle."""
    label = "90° to 120°"
    axes.axhspan(*_BAND, color="0.5", alpha=0.15, linewidth=0, zorder=0, label=label)
    axes.set_yticks(range(0, 181, every))
    axes.set_ylabel("degrees")


def _iterations(smoothed: Tensor) -> range:
    """Iteration of the newest of the angles that each value is the mean of."""
    return range(_AVERAGE, _AVERAGE + len(smoothed))


def _plain_log(axes: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_drops(panels: Sequence[Axes], drops: Sequence[int]) -> None:
    for axes in panels:
        axes.vlines(
            drops, 0, 1, transform=axes.get_xaxis_transform(), color=_DROP, linewidth=0.7, alpha=0.5
        )
    note = f"rate dropped {'once' if len(drops) == 1 else f'{len(drops)} times'}"
    panels[-1].plot([], [], color=_DROP, linewidth=1, label=f"{note} (red lines, all panels)")


def _finish(figure: Figure, panels: Sequence[Axes], path: str | Path | None, title: str) -> Figure:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        handles, _ = axes.get_legend_handles_labels()
        if handles:  # above the panel: inside it would cover data
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
    figure.suptitle(title, fontsize="large")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
