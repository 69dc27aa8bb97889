"""plotting: what is drawn, and that nothing is left behind."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from autodrop_ext import AnytimeAutoDrop, AutoDrop, EpochAutoDrop
from autodrop_ext.plotting.compare import plot_runs
from autodrop_ext.plotting.panels import running_mean
from autodrop_ext.plotting.run import plot_run
from autodrop_ext.plotting.titles import kind_of


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
    (lines,) = [c for c in axes.collections if c.get_gid() == "marks"]
    return [segment[0][0] for segment in lines.get_segments()]


@pytest.mark.parametrize("num_drops", [1, 3, 60])
def test_every_drop_is_marked_in_every_panel(num_drops, tmp_path):
    run = readings(num_drops)
    path = tmp_path / "run.png"
    figure = plot_run(run, METRICS, path=path, title="a run")
    steps = [r["step"] for r in run if r["dropped"]]
    assert titles(figure) == [
        "Training loss, running mean",
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
    assert legend(figure.axes[-1]) == [f"rate dropped {times} (red lines)"]
    assert figure.axes[-1].get_yscale() == ("log" if num_drops == 60 else "linear")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_each_part_of_a_run_is_drawn_with_its_own_threshold():
    early = [reading(w, rise=1.0, threshold=0.1) for w in range(2, 6)]
    late = [reading(w, rise=1.0, threshold=5.0) for w in range(6, 9)]
    drawn = {line.get_label(): line for line in plot_run(early + late).axes[1].lines}
    assert list(drawn["kept"].get_xdata()) == [r["step"] for r in early + late]
    assert list(drawn["threshold"].get_ydata()) == [0.1] * 4 + [5.0] * 3


def test_param_groups_that_decide_for_themselves_have_lines_and_points_in_their_colours():
    def grouped(window, dropped):
        values = {"group_angles": [80.0, 81.0], "group_smoothed": [80.0, 81.0]}
        values |= {"group_rises": [-1.0, 2.0], "dropped_groups": [0] if dropped else []}
        return reading(window, lr=[0.1, 0.2], dropped=dropped, **values)

    figure = plot_run([reading(2), grouped(3, False), grouped(4, True)])
    angle, rise = figure.axes[:2]
    assert legend(angle) == ["each window", "group 0, smoothed", "group 1, smoothed"]
    smoothed = [line.get_color() for line in angle.lines[1:]]
    assert len(set(smoothed)) == 2
    points = [line for line in rise.lines if line.get_gid()]
    assert [line.get_color() for line in points] == [smoothed[0]] * 2 + [smoothed[1]] * 2
    drops = [line.get_xdata() for line in points if line.get_gid() == "dropped"]
    assert [list(steps) for steps in drops] == [[20], []]
    assert legend(rise) == ["kept", "dropped", "threshold"]


def test_without_losses_there_is_no_panel_for_them(tmp_path):
    other = [{"step": 3, "accuracy": 0.5}, {"step": 6, "loss": None}]
    assert titles(plot_run(readings(1), other, path=tmp_path / "a.png"))[0] == "Angular velocity"


def test_gaps_do_not_crash(tmp_path):
    run = [reading(w, angle=None, lr=[]) for w in range(2, 5)]
    metrics = [{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}, {"step": 3, "accuracy": 1.0}]
    figure = plot_run(run, metrics, path=tmp_path / "a.png")
    assert all(math.isnan(v) for v in figure.axes[1].lines[0].get_ydata())
    assert legend(figure.axes[-1]) == ["rate never dropped"]


def test_a_rate_that_falls_little_has_an_axis_with_numbers(tmp_path):
    figure = plot_run([reading(w, lr=[0.1 * 0.97**w]) for w in range(2, 20)])
    assert figure.axes[-1].get_yscale() == "linear"
    figure.savefig(tmp_path / "a.png")
    axes = figure.axes[-1]
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


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
    plot_run(run, metrics, path=tmp_path / "a.png")
    plot_runs({"a": (run, metrics), "b": (run, metrics)}, path=tmp_path / "b.png")
    plot_run([r | anytime(1) for r in run], metrics, path=tmp_path / "c.png")


def test_running_means():
    alternating = [float(i % 2) for i in range(400)]
    steps, means = running_mean(range(400), alternating)
    assert list(steps) == list(range(400))
    assert means[0] == pytest.approx(3 / 6)  # the first value and five after it
    assert means[200] == pytest.approx(6 / 11)  # five on both sides: a 40th of the run
    assert running_mean([1, 2], [math.nan, 3.0])[1][1] == 3.0
    assert running_mean(range(9), [0.0, 3.0, 0.0] * 3)[1][1:-1] == [1.0] * 7  # of three at least
    assert len(running_mean(range(100_000), [1.0] * 100_000)[0]) == 1000
    steps, means = running_mean(range(400), alternating, growing=True)
    assert steps[:20] == list(range(20))
    assert means[steps.index(40)] == pytest.approx(2 / 5)  # two on both sides: a tenth of 40
    assert means[-1] == pytest.approx(10 / 20)  # the last one and 19 before it


def anytime(window, **values):
    steps = 16 * 2 ** (window // 8)
    plain = {"window": window, "window_steps": steps, "step": 16 * (window + 1) * 2}
    plain |= {"cosine": 0.5 - window / 40, "mean_cosine": 0.5 - window / 50, "lr": [0.1 / window]}
    return plain | {"power": max(0.0, window / 50 - 0.25), "dropped": False} | values


def test_what_is_drawn_of_growing_windows(tmp_path):
    run = [anytime(w) for w in range(1, 20)]
    run[0] |= {"cosine": None, "mean_cosine": None}
    figure = plot_run(run, METRICS, {"critical": 0.3}, path=tmp_path / "a.png", title="a run")
    names = ["Training loss, running mean", "Cosine of the angle", "Exponent p", "Learning rate"]
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
    assert drop_lines(power) == [run[7]["step"], run[15]["step"]]
    assert legend(rate) == ["window doubles, from 16 to 64 steps (grey lines)"]
    assert titles(plot_run(run)) == names[1:]
    assert legend(plot_run(run).axes[0]) == ["window", "mean"]


def test_the_end_of_an_automatic_warm_up_is_marked():
    run = [anytime(w, warmup="rising" if w < 5 else "confined" if w == 5 else None) for w in (3, 5)]
    figure = plot_run([*run, anytime(6), anytime(7)])
    label = "automatic warm-up ends: confined (blue line)"
    assert label in legend(figure.axes[-1])
    lines = [c for c in figure.axes[0].collections if c.get_gid() == "marks"]
    assert [c.get_segments()[0][0][0] for c in lines] == [run[1]["step"]]


@pytest.mark.parametrize(("error", "drawn"), [(0.0, False), (0.01, False), (0.9, True)])
def test_two_standard_errors_are_a_band_if_it_is_wide_enough_to_see(error, drawn):
    run = [reading(w, standard_error=error) for w in range(20)]  # angles of 80 to 86 degrees
    (angle, *_) = plot_run(run).axes
    bands = [c for c in angle.collections if c.get_label() == "two standard errors"]
    assert len(bands) == drawn
    if drawn:
        low, high = (
            bands[0].get_paths()[0].vertices[:, 1].min(),
            bands[0].get_datalim(angle.transData).y1,
        )
        assert (low, high) == pytest.approx((80 - 2 * error, 86 + 2 * error))


def epoch(number, **values):
    plain = {"window": number, "step": 10 * number, "angle": 80.0 + number % 7, "lr": [0.1]}
    return plain | {"change": 1.0 + number % 3, "threshold": 0.5, "waited": None} | values


def test_what_is_drawn_of_epochs(tmp_path):
    run = [epoch(n) for n in range(2, 5)] + [epoch(5, waited=0, change=0.4)]
    run += [epoch(6, waited=1), epoch(7, waited=2, dropped=True), epoch(8, threshold=5.0)]
    figure = plot_run(run, METRICS, path=tmp_path / "a.png")
    assert titles(figure) == ["Angular velocity", "Its change", "Learning rate"]
    angle, change, rate = figure.axes
    assert list(angle.lines[0].get_xdata()) == list(range(2, 9))
    drawn = {line.get_label(): line for line in change.lines}
    assert list(drawn["condition met"].get_xdata()) == [5]
    assert list(drawn["condition met"].get_ydata()) == [0.4]
    assert list(drawn["not met"].get_xdata()) == [2, 3, 4, 6, 7, 8]
    assert list(drawn["threshold"].get_ydata()) == [0.5] * 6 + [5.0]
    for axes in figure.axes:
        assert drop_lines(axes) == [7]
        spans = [patch.get_xy()[0] for patch in axes.patches if patch.get_gid() == "delay"]
        assert spans == [5, 6]
    assert legend(rate) == ["delay before a drop", "rate dropped once (red lines)"]
    assert rate.get_xlabel() == "epoch"


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


def comparable(lr, losses=()):
    run = [reading(w, lr=[lr, 1.0]) for w in range(2, 5)]
    return run, [{"step": step, "loss": loss} for step, loss in enumerate(losses)]


def test_what_a_comparison_draws():
    figure = plot_runs({"a": comparable(0.1), "b": comparable(0.2, [1.0, 2.0, None])})
    assert [axes.get_title(loc="left").split(",")[0] for axes in figure.axes] == [
        "Training loss",
        "Angular velocity",
        "Learning rate",
    ]
    loss, angle, rate = figure.axes
    (values, means) = loss.lines
    assert list(values.get_ydata())[:2] == [1.0, 2.0]
    assert list(means.get_ydata()) == [1.5, 1.5, 2.0]
    a, b = angle.lines
    assert means.get_color() == b.get_color() != a.get_color()
    assert list(a.get_ydata()) == [82.5, 83.0, 83.5]
    assert [set(line.get_ydata()) for line in rate.lines] == [{0.1}, {0.2}]
    assert len(plot_runs({"a": comparable(0.1)}).axes) == 2
    many = plot_runs({str(i): comparable(0.1) for i in range(10)}).axes[0].lines
    assert len({(line.get_color(), line._unscaled_dash_pattern) for line in many}) == 10
    with pytest.raises(ValueError, match=r"runs\['a'\]: expected at least one reading"):
        plot_runs({"a": ([], [])})
    with pytest.raises(ValueError, match="runs: expected at least one, got none"):
        plot_runs({})


def test_what_readings_are_about():
    assert kind_of([reading(2)]) == "windows"
    assert kind_of([epoch(2)]) == "epochs"
    assert kind_of([anytime(2)]) == "growing"
