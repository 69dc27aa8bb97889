"""What a picture shows of standard errors and of param groups that decide for themselves."""

from __future__ import annotations

import collections
import math
from typing import Any

import pytest
from matplotlib.collections import PolyCollection

from autodrop_ext import Decision
from autodrop_ext.plotting.run import plot_run


def decision(window: int, **values: Any) -> dict[str, Any]:
    plain = {"step": 4 * (window + 1), "window": window, "angle": 80.0 + window % 7}
    lengths = {"cosine": 0.2, "norm": 1.0, "previous_norm": 1.0}
    return Decision(**(plain | lengths | {"lr": (0.1, 0.1)} | values)).as_dict()


def bands(figure: Any) -> list[PolyCollection]:
    (axes,) = [a for a in figure.axes if a.get_title(loc="left") == "Angular velocity"]
    return [c for c in axes.collections if isinstance(c, PolyCollection)]


def test_angles_have_a_band_of_two_standard_errors() -> None:
    run = [decision(w, standard_error=0.5 + w / 10) for w in range(2, 12)]
    run[4] |= {"angle": None, "standard_error": None}  # undefined: a gap
    (band,) = bands(plot_run(run, threshold=0.1))
    heights = [y for path in band.get_paths() for _, y in path.vertices]
    assert max(heights) == pytest.approx(
        max(r["angle"] + 2 * r["standard_error"] for r in run if r["angle"] is not None)
    )
    assert len(band.get_paths()) == 2
    assert all(map(math.isfinite, heights))
    assert band.get_label() == "two standard errors"


@pytest.mark.parametrize("error", [0.0, 0.01])
def test_angles_without_errors_that_could_be_seen_have_none(error: float) -> None:
    """0.01 degrees of 6; by default an error is 0.11 degrees, and angles scatter by several."""
    run = [decision(w, standard_error=error) for w in range(2, 12)]
    assert bands(plot_run(run, threshold=0.1)) == []


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_have_lines_and_rises_of_their_own(groups: int) -> None:
    run = []
    for w in range(2, 20):
        at_drop = w % 6 == 0
        run.append(
            decision(
                w,
                group_angles=tuple(70.0 + g + w % 3 for g in range(groups)),
                group_smoothed=tuple(75.0 + g for g in range(groups)),
                group_rises=tuple(-1.0 if at_drop else 2.0 for _ in range(groups)),
                dropped=at_drop,
                dropped_groups=(0,) if at_drop else (),
            )
        )
    figure = plot_run(run, threshold=0.1)
    angle, rise = figure.axes[0], figure.axes[1]
    labels = [line.get_label() for line in angle.get_lines()]
    assert [f"group {g}, smoothed" in labels for g in range(2)] == [True, groups == 2]
    counts: collections.Counter[str] = collections.Counter()
    for line in rise.get_lines():
        counts[line.get_gid()] += len(line.get_xdata())
    drops = sum(r["dropped"] for r in run)
    assert counts["dropped"] == drops == 3
    assert counts["kept"] + counts["held back"] == groups * len(run) - drops
