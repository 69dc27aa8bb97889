"""What the pictures show: which data are in which panel, under which name and in which colour."""

from __future__ import annotations

import pytest
from training import curves
from training.curves import draw_bars, draw_curves, draw_rates


def results(*seeds, measure="test error, %"):
    """Two seeds' runs of five epochs, in which every value is another one."""
    return [
        {
            "diverged": False,
            "measure": measure,
            "steps_per_epoch": 10,
            "curve": [
                {
                    "epoch": e,
                    "lr": 0.1 / e + seed,
                    "loss": 2 / e + seed,
                    "test_loss": 3 / e + seed,
                    "error": 40 / e + seed,
                }
                for e in range(1, 6)
            ],
            "angles": [[10 * e, 90.0 + e + seed] for e in range(3, 6)],
            "end_angles": [[10 * e, 60.0 + e + seed] for e in range(3, 6)],
        }
        for seed in seeds
    ]


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """Draw, and return the figure and its panels by their titles; the picture is also written."""

    def draw(function, *arguments, **options):
        saved, save = [], curves._save
        monkeypatch.setattr(
            curves, "_save", lambda figure, *rest: (saved.append(figure), save(figure, *rest))
        )
        path = tmp_path / "picture.png"
        function(*arguments, path, title="a title", **options)
        assert path.read_bytes().startswith(b"\x89PNG")
        (figure,) = saved
        return figure, {axes.get_title(loc="left"): axes for axes in figure.axes}

    return draw


def drawn(axes):
    """Points of each line by its name."""
    return {line.get_label(): list(map(float, line.get_ydata())) for line in axes.lines}


def names(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_curves_show_the_means_of_each_value(panels):
    lines = {"AutoDrop": results(0, 1), "step decay": results(2, 3), "HD": results(4)}
    figure, shown = panels(draw_curves, lines)
    values = {
        "Learning rate after each epoch": 0.1,
        "Training loss": 2,
        "Test loss": 3,
        "Error": 40,
        "Error, enlarged": 40,
    }
    assert set(shown) == {*values, ""}  # the last one is the legend's place
    for title, top in values.items():
        points = drawn(shown[title])
        assert list(points) == ["AutoDrop", "step decay", "HD"]
        for name, mean in (("AutoDrop", 0.5), ("step decay", 2.5), ("HD", 4.0)):
            assert points[name] == pytest.approx([top / e + mean for e in range(1, 6)]), title
        assert len({line.get_color() for line in shown[title].lines}) == 3
        assert shown[title].lines[0].get_color() == "black"
    assert names(shown[""].get_legend()) == ["AutoDrop", "step decay", "HD"]
    assert shown["Error"].get_ylabel() == "test error, %"
    assert figure.get_suptitle() == "a title"
    low, high = shown["Error, enlarged"].get_xlim()
    assert (low, high) == (3.0, 5.0)


def test_a_translators_panels_have_their_names(panels):
    lines = {"AutoDrop": results(0, measure="100 - BLEU")}
    _, shown = panels(draw_curves, lines)
    assert {"Distance from 100 BLEU", "Validation loss", "Training loss"} <= set(shown)
    assert not {"Error", "Test loss"} & set(shown)
    assert shown["Distance from 100 BLEU"].get_ylabel() == "100 - BLEU"


def test_runs_that_diverge_are_left_out(panels):
    lost = [{**r, "diverged": True} for r in results(5)]
    _, shown = panels(draw_curves, {"AutoDrop": results(0) + lost, "HD": lost})
    assert drawn(shown["Error"]) == {"AutoDrop": pytest.approx([40 / e for e in range(1, 6)])}


@pytest.mark.parametrize(("key", "top"), [("angles", 90.0), ("end_angles", 60.0)])
def test_five_rates_are_five_lines(panels, key, top):
    rates = [f"rate {rate}" for rate in (0.3, 0.1, 0.03, 0.01, 0.003)]
    lines = {name: results(i) for i, name in enumerate(rates)}
    figure, shown = panels(draw_rates, lines, angles=key)
    loss, angle = shown["Training loss"], shown["Angular velocity of epochs"]
    for i, name in enumerate(rates):
        assert drawn(loss)[name] == pytest.approx([2 / e + i for e in range(1, 6)])
        assert drawn(angle)[name] == pytest.approx([top + e + i for e in range(3, 6)])
    for axes in (loss, angle):
        assert len({line.get_color() for line in axes.lines}) == 5
    assert [line.get_color() for line in loss.lines] == [line.get_color() for line in angle.lines]
    assert list(map(float, angle.lines[0].get_xdata())) == [3.0, 4.0, 5.0]
    assert names(figure.legends[0]) == rates


def test_bars_have_their_heights(panels):
    groups = {"one": {"baseline": 150.0, "AutoDrop": 120.0}, "two": {"baseline": 90.0}}
    figure, _ = panels(draw_bars, groups, unit="epochs")
    (axes,) = figure.axes
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axes.containers}
    assert heights == {"baseline": [150.0, 90.0], "AutoDrop": [120.0]}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["one", "two"]
    assert len({bars[0].get_facecolor() for bars in axes.containers}) == 2
    assert axes.get_ylabel() == "epochs" and names(figure.legends[0]) == ["baseline", "AutoDrop"]
