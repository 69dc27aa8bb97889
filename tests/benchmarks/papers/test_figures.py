"""theory.figures, and the command that draws them, in small."""

from __future__ import annotations

import math
import sys

import pytest
from papers.theory import (
    AutomaticDrop,
    NoisyQuadratic,
    VelocityModel,
    algorithm_2,
    learning_rate,
)
from papers.theory.draw import main
from papers.theory.figures import (
    plot_algorithm_2,
    plot_automatic_drop,
    plot_constant_rates,
    plot_velocity_model,
)

MODEL = VelocityModel(gamma=0.1, epsilon=0.3)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in a narrow terminal and return what it printed."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def labels(figure):
    return [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]


def line(axes, label):
    return next(each for each in axes.lines if each.get_label() == label)


# ---- figures --------------------------------------------------------------------------------


def test_constant_rates_beside_their_limits():
    quadratic = NoisyQuadratic([0.5, 1.0])
    runs = {lr: quadratic.run(lr, 40, [0, 1]) for lr in (0.5, 0.1)}
    figure = plot_constant_rates(quadratic, runs)
    assert labels(figure) == [("", "loss"), ("iteration", "degrees")]
    loss, angle = figure.axes
    drawn = line(loss, "rate 0.1").get_ydata()
    assert drawn == pytest.approx(runs[0.1].loss.mean(dim=0))
    levels = {float(each.get_ydata()[0]) for each in angle.lines if len(each.get_ydata()) == 2}
    assert levels == {quadratic.limits(lr).angle for lr in runs}
    curves = [each for each in angle.lines if len(each.get_ydata()) > 2]
    assert curves[0].get_xdata()[0] == 20  # the newest of the first 20 angles
    assert curves[0].get_ydata() == pytest.approx(runs[0.5].smoothed_angle(20).mean(dim=0))


def test_automatic_drops_are_marked_where_they_are():
    quadratic = NoisyQuadratic([1.0], sigma=0.0)
    dropped = quadratic.run(0.06, 40, [0], drop=AutomaticDrop(min_lr=0.03, average=3))
    figure = plot_automatic_drop(dropped, {0.06: quadratic.run(0.06, 40, [0])})
    assert labels(figure) == [("", "loss"), ("", "degrees"), ("iteration", "learning rate")]
    # The rate of iteration 5 is the first lower one; see where_drops_happen in the tests of runs.
    rate = figure.axes[2]
    for name in ("each run", "geometric mean"):
        drawn = line(rate, name).get_ydata()
        assert [i for i in range(1, len(drawn)) if drawn[i] < drawn[i - 1]] == [5]


def test_drops_of_several_runs_are_not_drawn_as_those_of_one():
    quadratic = NoisyQuadratic([1.0, 2.0])
    dropped = quadratic.run(
        0.06, 60, [0, 1, 2], drop=AutomaticDrop(min_lr=0.01, average=3, threshold=1.0)
    )
    figure = plot_automatic_drop(dropped, {0.06: quadratic.run(0.06, 60, [0])})
    loss, angle, rate = figure.axes
    assert len({tuple(lrs.tolist()) for lrs in dropped.lr}) == 3
    assert len(rate.lines) == 4
    expected = dropped.lr.log().mean(dim=0).exp()
    assert line(rate, "geometric mean").get_ydata() == pytest.approx(expected)
    # No line of one run's drops crosses the means.
    assert not loss.collections
    assert len(angle.patches) == len(angle.collections) + 1


def test_the_velocity_model_in_degrees():
    figure = plot_velocity_model(MODEL, [1.0, 0.1], 100)
    (axes,) = figure.axes
    assert labels(figure) == [("iterations since the rate was changed", "degrees")]
    curve = line(axes, "rate 1")
    assert curve.get_xdata()[-1] == 100
    assert curve.get_ydata()[-1] == pytest.approx(math.degrees(MODEL.velocity(100.0, 1.0)))


def test_algorithm_2_starts_over_at_every_drop(tmp_path):
    phases = list(algorithm_2(MODEL, 0.05, [learning_rate(i) for i in range(3)]))
    figure = plot_algorithm_2(MODEL, phases, path=tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    angle, rate = figure.axes
    assert labels(figure) == [("", "degrees"), ("iteration", "learning rate")]
    for phase, curve in zip(phases, angle.lines, strict=True):
        assert curve.get_xdata()[0] == phase.start
        assert curve.get_ydata()[0] == 0
        end = math.degrees(MODEL.velocity(float(phase.gap), phase.lr))
        assert curve.get_ydata()[-1] == pytest.approx(end)
    assert list(rate.lines[0].get_ydata()[:3]) == [phase.lr for phase in phases]
    with pytest.raises(ValueError, match="phases: expected at least one"):
        plot_algorithm_2(MODEL, [])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'autodrop_ext\[plot\]'"):
        plot_velocity_model(MODEL, [1.0], 10)


# ---- the command ----------------------------------------------------------------------------


def test_nqm_sets_angles_next_to_the_theorem(run, tmp_path):
    printed = run("nqm", "--seeds", 3, "--steps", 300, "--output", tmp_path)
    rows = [row.split("│")[1:-1] for row in printed.splitlines() if row.startswith("│")]
    cells = {name: values for name, *values in ([c.strip() for c in row] for row in rows)}
    assert list(cells) == ["0.06", "0.03", "0.01", "0.001", "automatic"]
    assert cells["0.06"][1] == "118.23°"
    for rate in ("0.06", "0.03"):
        angle, theorem = (float(cells[rate][i].rstrip("°")) for i in (0, 1))
        assert abs(angle - theorem) < 1.5  # 450 angles that scatter by 5.4 degrees: 0.25
    assert all(len(text) <= 80 for text in printed.splitlines() if "Picture" not in text)
    for name in ("nqm.png", "nqm-drops.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / name) in printed


def test_algorithm_2s_drops_are_printed(run, tmp_path):
    printed = run("algorithm-2", "--steps", 2000, "--output", tmp_path)
    rows = [row.split("│")[1:-1] for row in printed.splitlines() if row.startswith("│")]
    cells = [[c.strip() for c in row] for row in rows]
    assert [row[0] for row in cells] == [str(i) for i in range(15)]
    # tau0 = 0.01 binds: k = (sqrt(1.3 pi 0.05 / 0.02) - 1) / 0.05 = 43.9, rounded up
    assert cells[0][1:4] == ["1.0000", "0", "44"]
    assert cells[1][2] == "44"
    assert "more rates follow" in printed
    assert all(len(text) <= 80 for text in printed.splitlines() if "Picture" not in text)
    for name in ("velocity-model.png", "algorithm-2.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nqm", "--window", "3"), "unrecognized arguments: --window 3"),
        (("algorithm-2", "--seeds", "2"), "unrecognized arguments: --seeds 2"),
        # 20 angles make one mean, and a change needs two means.
        (("nqm", "--steps", "21"), "argument --steps: expected at least 22, got 21"),
        (("nqm", "--seeds", "none"), "argument --seeds: expected at least 1, got none"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--output", str(tmp_path / "new")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_least_steps_give_two_means():
    few = NoisyQuadratic([1.0]).run(0.1, 22, [0], drop=AutomaticDrop())
    assert few.smoothed_angle(20).shape == (1, 2)
