"""cli: ``autodrop plot`` of one log and of several, and of logs that are broken."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest

from autodrop_ext.cli import main
from autodrop_ext.cli import plot as plot_module
from autodrop_ext.log import JsonLinesLog, read_log
from autodrop_ext.plotting.titles import title_of
from autodrop_ext.reading import Decision


def decision(window: int, **values: Any) -> Decision:
    plain: dict[str, Any] = {
        "step": 64 * (window + 1),
        "window": window,
        "angle": 80.0 + window % 7,
    }
    plain |= {"cosine": 0.1, "norm": 1.0, "previous_norm": 1.0, "lr": (0.1,)}
    return Decision(**(plain | values))


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
def test_no_log_ends_in_a_traceback(
    line: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.jsonl"
    usual = '{"event": "reading", "step": 0, "angle": 80.0, "lr": [0.1], "dropped": false}'
    path.write_text(f"{usual}\n{line}\n")
    if line in BROKEN:
        with pytest.raises(SystemExit) as error:
            main(["plot", str(path)])
        message = str(error.value.code)
        assert message.startswith("autodrop: ")
        assert "\n" not in message and "\x1b" not in message
    else:
        main(["plot", str(path)])
        assert "\x1b" not in capsys.readouterr().out


def test_a_file_name_controls_no_terminal(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b[2Jb\u202e$x$.jsonl"
    shutil.copy(long_run(tmp_path / "run.jsonl", 1).path, tmp_path / name)
    main(["plot", str(tmp_path / name)])
    both = [str(tmp_path / name), str(tmp_path / "run.jsonl")]
    main(["plot", *both, "-o", str(tmp_path / "both.png")])
    with pytest.raises(SystemExit) as error:
        main(["plot", str(tmp_path / f"{name}.none")])
    for output in (*capsys.readouterr().out.splitlines()[:1], str(error.value.code)):
        assert "\x1b" not in output
        assert "\u202e" not in output
        assert r"a\x1b[2Jb" in output


def test_a_picture_shows_the_settings_of_its_run(tmp_path: pathlib.Path) -> None:
    log = JsonLinesLog(tmp_path / "first.jsonl")
    log.begin({"scheduler": "AutoDrop", "window": 4, "threshold": 5.0, "min_lr": [0.01, 0.01]})
    log(decision(2, rise=4.0, dropped=True))
    run = read_log(log.path)
    title = "AutoDrop, window 4, threshold 5°, min_lr 0.01; 192 steps, 1 drop"
    assert title_of(run.settings, run.readings, "first") == title
    log.begin({"window": 4, "cooldown": {"begin": 10, "num_steps": 8}})  # resumed
    log.metrics(54_321, loss=1.0)  # Losses go on after the last reading.
    run = read_log(log.path)
    title = "first: window 4, cooldown begin 10 num_steps 8; 54,321 steps, 1 drop"
    assert title_of(run.settings, run.readings, "first", run.metrics) == title


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
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    main(["plot", a, b])
    assert drawn == ["a (window 4)", "b (window 8)"]
    main(["plot", a, c])
    assert drawn[2:] == ["a (AutoDrop, window 4, threshold 0.1°)", "c"]


def test_plot_of_growing_windows(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "any.jsonl"
    lines = [
        decision(w).as_dict()
        | {"event": "reading", "window_steps": 16, "mean_cosine": 0.2, "power": 0.25}
        for w in range(2, 9)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["plot", str(path)])
    assert capsys.readouterr().out == f"{tmp_path / 'any.png'}: 7 readings\n"
    assert (tmp_path / "any.png").stat().st_size > 10_000


def test_plot_of_several_logs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, drops in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        long_run(tmp_path / name / "run.jsonl", drops)
    long_run(tmp_path / "c.jsonl", 3)
    main(["plot", "a/run.jsonl", "b/run.jsonl"])
    assert capsys.readouterr().out.splitlines() == [
        "comparison.png:",
        "  a/run: 11 readings, 1 drop",
        "  b/run: 22 readings, 2 drops",
    ]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    main(["plot", "a/run.jsonl", "c.jsonl", "--output", "two.svg"])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  run: 11 readings, 1 drop",
        "  c: 33 readings, 3 drops",
    ]
    assert (tmp_path / "two.svg").read_text().startswith("<?xml")
