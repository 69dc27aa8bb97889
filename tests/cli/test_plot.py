"""cli: ``autodrop plot`` of one log and of several, and of logs that are broken."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest
from click.testing import CliRunner

from autodrop_ext.cli import plot as plot_module
from autodrop_ext.cli.app import autodrop
from autodrop_ext.cli.plot import kind_of
from autodrop_ext.log import JsonLinesLog
from autodrop_ext.plotting.compare import plot_runs
from autodrop_ext.reading import Decision
from autodrop_ext.schedulers import EpochDecision


def run(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "80"}).invoke(autodrop, [str(a) for a in arguments])


def decision(window: int, **values: Any) -> Decision:
    plain: dict[str, Any] = {
        "step": 64 * (window + 1),
        "window": window,
        "angle": 80.0 + window % 7,
    }
    plain |= {"cosine": 0.1, "norm": 1.0, "previous_norm": 1.0, "lr": (0.1,)}
    return Decision(**(plain | values))


def epoch(number: int, **values: Any) -> EpochDecision:
    plain = vars(decision(number)) | {"step": 10 * number, "change": 1.0, "threshold": 0.01}
    return EpochDecision(**(plain | values))


def long_run(path: pathlib.Path, drops: int = 12) -> JsonLinesLog:
    log = JsonLinesLog(path)
    lr = 0.1
    for window in range(2, 2 + 11 * drops):
        last = (window - 1) % 11 == 0
        lr *= 0.8 if last else 1.0
        smoothed = 84.0 + window / 50 if (window - 1) % 11 in (0, 10) else None
        rise = -0.5 if last else None
        log(decision(window, smoothed=smoothed, rise=rise, lr=(lr,), dropped=last))
        log.metrics(64 * (window + 1), loss=3 / window)
    log.close()
    return log


BROKEN = [
    '{"event": "reading", "step": 1, "lr": 3}',
    '{"event": "reading", "step": 1, "lr": [[1]]}',
    '{"event": "reading", "step": 1, "angle": "x\\u001b[2J"}',
    '{"event": "reading", "step": 1e999}',
    '{"event": "reading", "step": 1, "angle": {"a": 1}}',
]
ODD = [
    "broken",
    "\x1b[2J",
    "[" * 100_000,
    '{"event": "reading", "step": 1, "angle": ' + "9" * 5000 + "}",
    '{"event": "reading", "step": 1, "angle": 1e999, "rise": -1e999, "lr": [1e999]}',
    '{"event": "reading", "step": 1, "angle": NaN, "smoothed": Infinity, "lr": [0.1]}',
    '{"event": "reading", "step": 1e18, "angle": 1e308, "rise": 1e308, "lr": [1e-320]}',
    '{"event": "reading", "step": 1, "angle": 1' + "0" * 400 + ', "lr": [1' + "0" * 400 + "]}",
    '{"event": "reading", "step": -5, "window": 1e99, "waited": 1e99, "dropped": 1}',
    '{"event": "reading", "step": 2, "power": 1e999, "window_steps": 1e999, "lr": []}',
    '{"event": "settings", "settings": {"threshold": 1e999, "x": [[1]], "\\u001b": "\\u001b"}}',
]


@pytest.mark.parametrize("line", BROKEN + ODD)
def test_no_log_ends_in_a_traceback(line: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    usual = '{"event": "reading", "step": 0, "angle": 80.0, "lr": [0.1], "dropped": false}'
    path.write_text(f"{usual}\n{line}\n")
    result = run("plot", path, "--threshold", 0.1)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert "\x1b" not in result.output
    if line in BROKEN:
        assert result.exit_code == 1
        assert sum(line.startswith("Error: ") for line in result.output.splitlines()) == 1
    elif line.count("waited") + line.count("power") == 0:
        assert result.exit_code == 0, result.output


def test_a_file_name_controls_no_terminal(tmp_path: pathlib.Path) -> None:
    name = "a\x1b[2Jb\u202e$x$.jsonl"
    shutil.copy(long_run(tmp_path / "run.jsonl", 1).path, tmp_path / name)
    other = tmp_path / "run.jsonl"
    for arguments in (
        ("plot", tmp_path / name),
        ("plot", tmp_path / name, "-o", tmp_path / name / "below.png"),
        ("plot", tmp_path / name, other, "-o", tmp_path / "both.png"),
        ("plot", tmp_path / f"{name}.none"),
    ):
        output = run(*arguments).output
        assert "\x1b" not in output
        assert "\u202e" not in output
        assert r"a\x1b[2Jb" in output.replace("\n", ""), output


def test_plot_of_epochs(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "epochs.jsonl")
    for n in range(1, 9):
        log(epoch(n, dropped=n == 5))
    result = run("plot", log.path)
    assert result.output == f"{tmp_path / 'epochs.png'}: 8 readings, 1 drop\n"
    assert (tmp_path / "epochs.png").stat().st_size > 10_000
    refused = run("plot", log.path, "--threshold", 1)
    assert refused.exit_code == 2
    assert "--threshold: expected none, the log has it with every reading" in refused.output


def test_a_picture_shows_the_settings_of_its_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = JsonLinesLog(tmp_path / "first.jsonl")
    log.begin({"scheduler": "AutoDrop", "window": 4, "threshold": 5.0, "min_lr": [0.01, 0.01]})
    log(decision(2, rise=4.0, dropped=True))
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plot_module, "plot_run", lambda *args, **values: drawn.update(values))
    result = run("plot", log.path)
    assert result.stderr == ""
    assert drawn["threshold"] == 5.0
    title = "AutoDrop, window 4, threshold 5°, min_lr 0.01; 192 steps, 1 drop"
    assert drawn["title"] == title
    run("plot", log.path, "--threshold", 3)
    assert drawn["threshold"] == 3.0
    log.begin({"scheduler": "AutoDrop", "window": 4, "threshold": 2.0})  # resumed with another
    run("plot", log.path)
    assert drawn["threshold"] == 2.0


def test_a_comparison_names_the_settings_that_differ(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, window in (("a", 4), ("b", 8)):
        log = JsonLinesLog(tmp_path / f"{name}.jsonl")
        log.begin({"scheduler": "AutoDrop", "window": window, "threshold": 0.1})
        log(decision(2))
    JsonLinesLog(tmp_path / "c.jsonl")(decision(2))
    drawn: list[str] = []
    monkeypatch.setattr(plot_module, "plot_runs", lambda runs, **values: drawn.extend(runs))
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    run("plot", a, b)
    assert drawn == ["a (window 4)", "b (window 8)"]
    run("plot", a, c)
    assert drawn[2:] == ["a (AutoDrop, window 4, threshold 0.1°)", "c"]


def test_plot_of_growing_windows(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "any.jsonl"
    lines = [
        decision(w).as_dict()
        | {"event": "reading", "window_steps": 16, "mean_cosine": 0.2, "power": 0.25}
        for w in range(2, 9)
    ]
    header = {"event": "settings", "version": "0", "settings": {"critical": 0.2}}
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]))
    result = run("plot", path)
    assert result.output == f"{tmp_path / 'any.png'}: 7 readings\n"
    assert (tmp_path / "any.png").stat().st_size > 10_000
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plot_module, "plot_anytime", lambda *args, **values: drawn.update(values))
    run("plot", path)
    assert drawn["critical"] == 0.2
    assert drawn["title"] == f"any: critical 0.2; {lines[-1]['step']} steps"
    # Losses go on after the last reading.
    with path.open("a") as file:
        file.write(json.dumps({"event": "metrics", "step": 54_321, "loss": 1.0}) + "\n")
    run("plot", path)
    assert drawn["title"] == "any: critical 0.2; 54,321 steps"


def test_plot_of_several_logs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, drops in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        long_run(tmp_path / name / "run.jsonl", drops)
    long_run(tmp_path / "c.jsonl", 3)
    result = run("plot", "a/run.jsonl", "b/run.jsonl")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "comparison.png:",
        "  a/run: 11 readings, 1 drop",
        "  b/run: 22 readings, 2 drops",
    ]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert run("plot", "a/run.jsonl", "c.jsonl", "--output", "two.svg").exit_code == 0
    assert "got one twice" in run("plot", "c.jsonl", "./c.jsonl").output
    assert (
        "expected none with several"
        in run("plot", "c.jsonl", "a/run.jsonl", "--threshold", 1).output
    )


def test_what_a_comparison_draws() -> None:
    measured = [d.as_dict() for d in (decision(2, smoothed=80.0), decision(3, lr=(0.05, 0.1)))]
    epochs = [epoch(n, lr=(0.2,)).as_dict() for n in (1, 2)]
    loss = [{"step": 3, "loss": 1.0}, {"step": 4, "accuracy": 1.0}]
    figure = plot_runs({"windows": (measured, []), "epochs": (epochs, loss)})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    angles = "Angular velocity, running mean (windows of different lengths: not comparable)"
    assert titles == ["Training loss", angles, "Learning rate of param group 0"]
    (loss_line,) = figure.axes[0].lines
    windows, of_epochs = figure.axes[1].lines
    assert loss_line.get_color() == of_epochs.get_color() != windows.get_color()
    assert list(windows.get_ydata()) == [82.5, 82.5]  # the mean of both
    assert list(of_epochs.get_ydata()) == [81.5, 81.5]
    assert list(figure.axes[2].lines[0].get_ydata()) == [0.1, 0.05]
    assert len(plot_runs({"windows": (measured, [])}).axes) == 2
    many = plot_runs({str(i): (measured, []) for i in range(10)}).axes[0].lines
    assert len({(line.get_color(), line._unscaled_dash_pattern) for line in many}) == 10
    with pytest.raises(ValueError, match=r"runs\['a'\]: expected at least one reading"):
        plot_runs({"a": ([], [])})
    with pytest.raises(ValueError, match="runs: expected at least one, got none"):
        plot_runs({})


def test_what_the_readings_of_a_log_are_about() -> None:
    assert kind_of([decision(2).as_dict()]) == "windows"
    assert kind_of([epoch(2).as_dict()]) == "epochs"
    assert kind_of([{**decision(2).as_dict(), "power": 0.0}]) == "anytime"
