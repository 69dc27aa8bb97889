"""plotting: what is drawn, and that nothing is left behind."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from autodrop_ext import AnytimeAutoDrop, AutoDrop, EpochAutoDrop
from autodrop_ext.plotting.anytime import plot_anytime
from autodrop_ext.plotting.compare import plot_runs
from autodrop_ext.plotting.panels import running_mean
from autodrop_ext.plotting.run import plot_run


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


def test_a_drop_that_min_lr_held_back_is_no_rate_that_was_kept_above_the_threshold():
    run = readings(2)
    held = [reading(40, rise=-2.0, smoothed=80.0), reading(41, rise=3.0), reading(42, rise=0.5)]
    rise = plot_run(run + held, threshold=1.0).axes[1]
    drawn = {line.get_label(): list(line.get_xdata()) for line in rise.lines}
    assert drawn["kept"][-1] == held[1]["step"]
    assert drawn["held back"] == [held[0]["step"], held[2]["step"]]
    assert len(drawn["dropped"]) == 2
    assert "held back" not in legend(plot_run(run, threshold=1.0).axes[1])
    # Without a threshold nobody knows.
    assert "held back" not in legend(plot_run(run + held).axes[1])


def test_each_part_of_a_run_is_drawn_with_its_own_threshold():
    early = [reading(w, rise=1.0, threshold=0.1) for w in range(2, 6)]
    late = [reading(w, rise=1.0, threshold=5.0) for w in range(6, 9)]
    rise = plot_run(early + late, threshold=5.0).axes[1]
    drawn = {line.get_label(): line for line in rise.lines}
    assert list(drawn["kept"].get_xdata()) == [r["step"] for r in early]
    assert list(drawn["held back"].get_xdata()) == [r["step"] for r in late]
    limit = drawn["threshold 0.1°, then 5°"]
    assert list(limit.get_ydata()) == [0.1] * 4 + [5.0] * 3


def test_param_groups_that_decide_for_themselves_have_colours_in_the_panel_of_the_rise():
    def grouped(window, dropped):
        values = {"group_angles": [80.0, 81.0], "group_smoothed": [80.0, 81.0]}
        values |= {"group_rises": [-1.0, 2.0], "dropped_groups": [0] if dropped else []}
        return reading(window, lr=[0.1, 0.2], dropped=dropped, **values)

    figure = plot_run([grouped(2, False), grouped(3, True)], threshold=0.1)
    smoothed = [line.get_color() for line in figure.axes[0].lines[1:]]
    points = [line for line in figure.axes[1].lines if len(line.get_xdata()) == 1]
    assert len(set(smoothed)) == 2
    assert {line.get_color() for line in points} <= {*smoothed, "0.6"}
    assert legend(figure.axes[1]) == ["kept", "held back", "dropped", "threshold 0.1°"]


def test_angles_of_different_windows_are_said_not_to_be_comparable():
    long = [r | {"step": 2 * r["step"]} for r in readings(2)]
    equal = plot_runs({"a": (readings(2), []), "b": (readings(1), [])})
    different = plot_runs({"a": (readings(2), []), "b": (long, [])})
    assert equal.axes[0].get_title(loc="left") == "Angular velocity, running mean"
    assert "windows of different lengths: not comparable" in different.axes[0].get_title(loc="left")


def test_a_rate_that_falls_little_has_an_axis_with_numbers(tmp_path):
    figure = plot_run([reading(w, lr=[0.1 * 0.97**w]) for w in range(2, 20)])
    figure.savefig(tmp_path / "a.png")
    axes = figure.axes[-1]
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_a_title_is_broken_where_a_setting_ends():
    settings = ", ".join(["AutoDrop"] + [f"setting {i} is {i}" for i in range(12)])
    rows = plot_run(readings(1), title=settings).get_suptitle().split("\n")
    assert len(rows) > 1
    assert all(row.endswith(",") for row in rows[:-1])
    assert " ".join(rows) == settings
    assert "\n" in plot_run(readings(1), title="word " * 40).get_suptitle()


def test_groups_with_equal_rates_share_a_line():
    equal = [reading(w, lr=[0.1 / w, 0.1 / w, 0.1]) for w in range(2, 6)]
    axes = plot_run(equal).axes[-1]
    assert legend(axes)[:2] == ["param groups 0, 1", "param group 2"]
    twins = plot_run([reading(w, lr=[0.1 / w] * 2) for w in range(2, 6)]).axes[-1]
    assert legend(twins) == ["rate never dropped"]


def test_a_name_with_dollars_is_no_formula(tmp_path):
    name = "$\\frac$ _run"
    plot_run(readings(1), title=name, path=tmp_path / "a.png")
    figure = plot_runs({name: (readings(1), METRICS), "_b$": (readings(2), METRICS)})
    figure.savefig(tmp_path / "b.png")
    (shared,) = figure.legends
    assert [text.get_text() for text in shared.get_texts()] == [name, "_b$"]


@pytest.mark.parametrize("value", [math.inf, -1e308, 1e308, 10**400, 1e-320, math.nan])
def test_no_value_breaks_a_picture(value, tmp_path):
    names = ("angle", "smoothed", "rise", "standard_error")
    run = [*readings(2), reading(60, lr=[value], **dict.fromkeys(names, value))]
    metrics = [*METRICS, {"step": 60, "loss": value}]
    plot_run(run, metrics, threshold=0.1, path=tmp_path / "a.png")
    plot_runs({"a": (run, metrics), "b": (run, metrics)}, path=tmp_path / "b.png")
    plot_anytime([r | anytime(1) for r in run], metrics, path=tmp_path / "c.png")


def test_running_means():
    steps, means = running_mean(range(400), [float(i % 2) for i in range(400)])
    assert list(steps) == list(range(400))
    assert means[0] == pytest.approx(3 / 6)  # the first value and five after it
    assert means[200] == pytest.approx(6 / 11)  # five on both sides: a 40th of the run
    assert running_mean([1, 2], [math.nan, 3.0])[1][1] == 3.0
    assert running_mean(range(9), [0.0, 3.0, 0.0] * 3)[1][1:-1] == [1.0] * 7  # of three at least
    assert len(running_mean(range(100_000), [1.0] * 100_000)[0]) == 1000


def anytime(window, **values):
    steps = 16 * 2 ** (window // 8)
    plain = {"window": window, "window_steps": steps, "step": 16 * (window + 1) * 2}
    plain |= {"cosine": 0.5 - window / 40, "mean_cosine": 0.5 - window / 50, "lr": [0.1 / window]}
    return plain | {"power": max(0.0, window / 50 - 0.25), "dropped": False} | values


def test_what_is_drawn_of_growing_windows(tmp_path):
    run = [anytime(w) for w in range(1, 20)]
    run[0] |= {"cosine": None, "mean_cosine": None}
    figure = plot_anytime(run, METRICS, critical=0.3, path=tmp_path / "a.png", title="a run")
    names = ["Training loss, mean over the last tenth of the steps so far"]
    names += ["Cosine of the angle", "Exponent p", "Learning rate"]
    assert titles(figure) == names
    assert all(axes.get_xscale() == "log" for axes in figure.axes)
    _, cosine, power, rate = figure.axes
    assert rate.get_yscale() == "log"
    drawn = {line.get_label(): line for line in cosine.lines}
    assert legend(cosine) == ["window", "mean", "critical 0.3"]
    assert drawn["window"].get_ydata()[5] == run[5]["cosine"]
    assert drawn["mean"].get_ydata()[5] == run[5]["mean_cosine"]
    assert math.isnan(drawn["mean"].get_ydata()[0])
    assert set(drawn["critical 0.3"].get_ydata()) == {0.3}
    assert list(power.lines[0].get_ydata()) == [d["power"] for d in run]
    # Windows 8 and 16 are the first of twice the length.
    doublings = [line.get_xdata()[0] for line in power.lines[1:]]
    assert doublings == [run[7]["step"], run[15]["step"]]
    assert legend(rate) == ["window doubles, from 16 to 64 steps"]
    assert len(plot_anytime(run).axes) == 3
    assert "critical" not in " ".join(legend(plot_anytime(run).axes[0]))
    assert titles(plot_run(run)) == names[1:]
    with pytest.raises(ValueError, match="decisions: expected at least one, got none"):
        plot_anytime([])


def test_rates_of_several_groups_and_of_zero(tmp_path):
    run = [reading(w, lr=[0.1, 0.0]) for w in range(2, 5)]
    axes = plot_run(run, path=tmp_path / "a.png").axes[-1]
    assert axes.get_yscale() == "linear"
    assert legend(axes)[:2] == ["param group 0", "param group 1"]


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


# ---- what a scheduler draws of itself ---------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "title"),
    [
        (AutoDrop, {"window": 4}, "AutoDrop, window 4, factor 0.95, threshold 0.1°, lr 0.1; 40"),
        (AnytimeAutoDrop, {"min_window": 2}, "AnytimeAutoDrop, min_window 2, lr 0.1; 4"),
        (EpochAutoDrop, {}, "EpochAutoDrop, factor 0.2, threshold 0.01°, delay 20, lr 0.1; 40"),
    ],
)
def test_a_schedulers_picture_says_what_it_was_made_with(kind, settings, title):
    parameter = torch.nn.Parameter(torch.randn(9))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = kind(optimizer, **settings)
    for i in range(40):
        parameter.grad = torch.randn(9)
        optimizer.step()
        if kind is not EpochAutoDrop or i % 4 == 3:
            scheduler.step()
    assert scheduler.plot().get_suptitle().startswith(title)
