"""examples/demo: every task in small, what it prints and writes, and what it refuses."""

from __future__ import annotations

import statistics

import pytest
import torch
from click.testing import CliRunner
from demo.digits import Digits
from demo.picture import plot_lengths
from demo.run import demo, read, read_at
from demo.training import SCHEDULES, train

import autodrop_ext


def run(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(demo, [str(a) for a in arguments])


def one_line_error(result):
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return line


@pytest.fixture(scope="module", params=["digits", "bytes"])
def small_demo(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    result = run("--task", request.param, "--seeds", 1, "--steps", 40, "--output", folder)
    assert torch.get_num_threads() == threads
    return request.param, folder, result


def test_demo_prints_a_row_for_every_schedule(small_demo):
    task, folder, result = small_demo
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == list(SCHEDULES)
    assert {"digits": "test error %", "bytes": "bits per byte"}[task] in result.output
    for name, *qualities, share in ([c.strip() for c in row] for row in rows):
        assert len(qualities) == 3
        assert all(0 < float(quality) < 100 for quality in qualities)
        assert share.endswith(" %"), name
    # 40 steps end before the first drop, and then both have the same rate and the same average.
    assert rows[0][1:-1] == rows[2][1:-1]
    assert len({tuple(row[1:-1]) for row in rows}) == len(rows) - 1
    assert all(len(line) <= 80 for line in result.output.splitlines() if str(folder) not in line)


def test_demo_writes_picture_and_logs(small_demo):
    task, folder, result = small_demo
    log = folder / f"{task}-autodrop.jsonl"
    picture = folder / f"{task}.png"
    readings, metrics, _ = autodrop_ext.read_log(log)
    assert len(readings) == 40 // {"digits": 3, "bytes": 2}[task] - 2
    assert [m["step"] for m in metrics] == list(range(1, 41))
    assert all(m["loss"] > 0 for m in metrics)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert f"autodrop plot {log}" in result.output
    assert str(picture) in result.output
    # The first window of AnytimeAutoDrop ends later, so that there is nothing to draw yet.
    other = folder / f"{task}-anytimeautodrop.jsonl"
    assert str(other) not in result.output
    assert len(autodrop_ext.read_log(other)[1]) == 40


def test_demo_replaces_the_log_of_an_earlier_run_and_repeats_it(tmp_path):
    def lines():
        result = run("--seeds", 1, "--steps", 60, "--window", 2, "--output", tmp_path)
        assert result.exit_code == 0
        assert "autodrop plot" in result.output
        return [path.read_text() for path in sorted(tmp_path.glob("*.jsonl"))]

    assert lines() == lines()
    assert len(lines()) == 3


def test_cosine_is_trained_for_each_length_and_read_at_its_end():
    task = Digits()
    settings = {"reads": (4, 12), "window": 3}
    once = train(task, "cosine", 0, steps=12, **settings)
    short = train(task, "cosine", 0, steps=4, **settings)
    other = train(task, "constant, averaged", 0, steps=12, **settings)
    assert [p["step"] for p in once.points] == [4, 12]
    assert [p["step"] for p in short.points] == [4]
    assert short.points[-1]["lr"] == once.points[-1]["lr"] == 0
    runs = {"cosine": [short, once], "constant, averaged": [other]}
    assert read(runs, "cosine", 4) == {0: short.quality(4)}
    assert read(runs, "cosine", 12) == {0: once.quality(12)}
    assert read(runs, "constant, averaged", 4) == {0: other.quality(4)}
    assert short.quality(4) != once.quality(4)


def test_steps_at_which_runs_are_read():
    steps = read_at((300, 900, 3000))
    assert steps == sorted(set(steps))
    assert {300, 900, 3000} <= set(steps)
    assert steps[0] == 100
    assert steps[-1] == 3000
    assert all(1.1 < b / a < 1.6 for a, b in zip(steps, steps[1:], strict=False))
    assert read_at((1, 5)) == [1, 2, 3, 4, 5]


def test_demo_says_how_much_the_filter_moves_angles(tmp_path):
    result = run("--seeds", 1, "--steps", 90, "--kernel", "time", "--output", tmp_path)
    readings = autodrop_ext.read_log(tmp_path / "digits-autodrop.jsonl").readings
    moved = [abs(r["smoothed"] - r["angle"]) for r in readings if r["smoothed"] is not None]
    text = " ".join(result.output.split())
    assert "(kernel='time'): ten angles in a row scatter by" in text
    assert f"moves the newest one by {statistics.fmean(moved):.1f} degrees" in text


def test_demo_that_ends_before_the_first_reading_draws_no_log(tmp_path):
    result = run("--seeds", 2, "--steps", 5, "--output", tmp_path)
    assert result.exit_code == 0
    assert (tmp_path / "digits.png").is_file()
    assert ".jsonl" not in result.output
    assert "mean of seeds 0 to 1" in result.output


@pytest.mark.parametrize("option", [("--steps", 0), ("--seeds", 0), ("--task", "mnist")])
def test_demo_refuses_wrong_options(option, tmp_path):
    assert option[0] in one_line_error(run(*option, "--output", tmp_path))


def test_demo_names_what_is_missing_before_it_trains(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = one_line_error(run("--output", tmp_path / "new"))
    assert error == (
        "Error: the demo needs matplotlib and sklearn: pip install 'autodrop_ext[demo]'"
    )
    assert not (tmp_path / "new").exists()


def test_demo_refuses_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert "--output" in one_line_error(run("--output", tmp_path / "file" / "below"))


# ---- the picture -------------------------------------------------------------


def points(steps, quality, lr):
    return [{"step": s, "quality": q, "lr": r} for s, q, r in zip(steps, quality, lr, strict=True)]


def test_runs_set_for_a_length_end_in_a_ring(tmp_path):
    path = tmp_path / "lengths.png"
    whole = points([10, 30, 100], [8.0, 4.0, 2.0], [0.1, 0.1, 0.05])
    short = points([10, 30], [6.0, 5.0], [0.05, 0.0])
    long = points([10, 30, 100], [9.0, 7.0, 3.0], [0.1, 0.08, 0.0])
    figure = plot_lengths({"own": whole}, {"cosine": [short, long]}, "test error %", path=path)
    quality, rate = figure.axes
    assert path.read_bytes().startswith(b"\x89PNG")
    names = [text.get_text() for text in quality.get_legend().get_texts()]
    assert names == ["own", "cosine, set for this length"]
    rings = [line for line in quality.lines if line.get_marker() == "o"]
    assert [(*map(float, r.get_xdata()), *map(float, r.get_ydata())) for r in rings] == [
        (30.0, 5.0),
        (100.0, 3.0),
    ]
    assert len(rate.lines) == 3
    assert rate.get_ylim()[0] > 0.01  # and not the zero at which cosine ends
    assert all(value > 0 for line in rate.lines for value in line.get_ydata())
    assert quality.get_xscale() == "log"
    with pytest.raises(ValueError, match="expected at least one run, got none"):
        plot_lengths({}, {}, "test error %")
