"""What a picture shows of sampled readings and of param groups that decide for themselves."""

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


def test_sampled_angles_have_a_band() -> None:
    run = [decision(w, standard_error=0.5, margin=1.0 + w) for w in range(2, 12)]
    run[4] |= {"angle": None, "margin": None}  # undefined: a gap
    (band,) = bands(plot_run(run, threshold=0.1))
    heights = [y for path in band.get_paths() for _, y in path.vertices]
    widest = run[-1]
    assert max(heights) >= widest["angle"] + widest["margin"] - 1e-9
    assert len(band.get_paths()) == 2
    assert all(map(math.isfinite, heights))


def test_exact_angles_have_none() -> None:
    assert bands(plot_run([decision(w) for w in range(2, 12)], threshold=0.1)) == []


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
