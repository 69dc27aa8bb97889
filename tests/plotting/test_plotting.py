"""plotting: what is drawn, and that nothing is left behind."""

from __future__ import annotations

import math
import sys

import pytest

from autodrop_ext.plotting.run import plot_comparison, plot_run


def reading(window: int, **values):
    plain = {"step": 4 * (window + 1), "window": window, "angle": 80.0 + window % 7}
    plain |= {"smoothed": None, "rise": None, "lr": [0.1], "dropped": False}
    return plain | values


def readings(num_drops: int):
    run = []
    lr = 0.1
    for window in range(2, 2 + 11 * num_drops):
        last = (window - 1) % 11 == 0
        lr *= 0.95 if last else 1.0
        smoothed = 80.0 + window % 5 if (window - 1) % 11 in (0, 10) else None
        rise = -1.0 if last else None
        run.append(reading(window, smoothed=smoothed, rise=rise, lr=[lr], dropped=last))
    assert sum(r["dropped"] for r in run) == num_drops
    return run


METRICS = [{"event": "metrics", "step": s, "loss": 1 / s, "lr": 0.1} for s in range(1, 60, 3)]


def titles(figure):
    return [axes.get_title(loc="left").split(":")[0] for axes in figure.axes]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def drop_lines(axes):
    (lines,) = [c for c in axes.collections if c.get_gid() == "drops"]
    return [segment[0][0] for segment in lines.get_segments()]


@pytest.mark.parametrize("num_drops", [1, 3, 60])
def test_every_drop_is_marked_in_every_panel(num_drops, tmp_path):
    run = readings(num_drops)
    path = tmp_path / "run.png"
    figure = plot_run(run, METRICS, threshold=0.1, path=path, title="a run")
    steps = [r["step"] for r in run if r["dropped"]]
    assert titles(figure) == [
        "Training loss",
        "Angular velocity",
        "Rise of the smoothed angle",
        "Learning rate",
    ]
    for axes in figure.axes:
        assert drop_lines(axes) == steps
    rise = figure.axes[2]
    (dropped,) = [line for line in rise.lines if "dropped" in str(line.get_label())]
    assert list(dropped.get_xdata()) == steps
    times = "once" if num_drops == 1 else f"{num_drops} times"
    assert legend(figure.axes[-1]) == [f"rate dropped {times} (red lines, all panels)"]
    assert figure.axes[-1].get_yscale() == "log"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_threshold_is_drawn_only_where_given():
    assert "threshold 0.25°" in legend(plot_run(readings(2), threshold=0.25).axes[1])
    assert not any(t.startswith("threshold") for t in legend(plot_run(readings(2)).axes[1]))


def test_without_losses_there_is_no_panel_for_them(tmp_path):
    other = [{"step": 3, "accuracy": 0.5}, {"step": 6, "loss": None}]
    assert titles(plot_run(readings(1), other, path=tmp_path / "a.png"))[0] == "Angular velocity"


def test_gaps_do_not_crash(tmp_path):
    run = [reading(w, angle=None, lr=[]) for w in range(2, 5)]
    metrics = [{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}, {"step": 3, "accuracy": 1.0}]
    figure = plot_run(run, metrics, threshold=0.1, path=tmp_path / "a.png")
    assert all(math.isnan(v) for v in figure.axes[1].lines[0].get_ydata())
    assert legend(figure.axes[-1]) == ["rate never dropped"]


def test_smoothed_line_breaks_at_a_drop():
    run = [reading(w, smoothed=80.0 + w, dropped=w == 4) for w in range(2, 8)]
    values = list(plot_run(run).axes[0].lines[1].get_ydata())
    assert math.isnan(values[3])
    assert values[2] == 84.0
    assert values[4] == 85.0


def test_rates_of_several_groups_and_of_zero(tmp_path):
    run = [reading(w, lr=[0.1, 0.0]) for w in range(2, 5)]
    axes = plot_run(run, path=tmp_path / "a.png").axes[-1]
    assert axes.get_yscale() == "linear"
    assert legend(axes)[:2] == ["param group 0", "param group 1"]


def test_comparison_shows_the_other_schedules(tmp_path):
    cosine = [{"step": s, "loss": 2 / s, "lr": max(0.0, 0.1 - s / 500)} for s in range(1, 60, 3)]
    runs = {"AutoDrop": METRICS, "cosine": cosine}
    path = tmp_path / "a.png"
    figure = plot_comparison(readings(3), runs, threshold=0.1, path=path)
    assert legend(figure.axes[0]) == ["AutoDrop", "cosine"]
    assert legend(figure.axes[-1])[:2] == ["AutoDrop", "cosine"]
    assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"own: expected one of \['AutoDrop', 'cosine'\]"):
        plot_comparison(readings(3), runs, own="other")


def test_no_pyplot_and_no_global_state(monkeypatch, tmp_path):
    import matplotlib

    def rc_params():  # reading "backend" would choose one
        return {k: v for k, v in dict.items(matplotlib.rcParams) if k != "backend"}

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    before = rc_params()
    plot_run(readings(2), METRICS, path=tmp_path / "a.svg")
    assert rc_params() == before


def test_no_readings():
    with pytest.raises(ValueError, match="readings: expected at least one, got none"):
        plot_run([])


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'autodrop_ext\[plot\]'"):
        plot_run(readings(1))
