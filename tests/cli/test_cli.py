"""cli: every command in small, and what users see when something is wrong."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import autodrop_ext
from autodrop_ext import AngularVelocity
from autodrop_ext.cli import doctor as doctor_module
from autodrop_ext.cli.app import autodrop
from autodrop_ext.cli.doctor import EXACT_LIMIT, SKETCH_LIMIT, largest_error


def run(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(autodrop, [str(a) for a in arguments])


def one_line_error(result):
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return line


def test_doctor_passes_and_says_what_is_here():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for expected in (autodrop_ext.__version__, torch.__version__, "cpu: used", "reference: works"):
        assert expected in result.output
    assert result.output.splitlines()[-1].startswith("PASS")
    assert "FAIL" not in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_doctor_has_colours_in_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setattr(doctor_module, "largest_error", lambda *arguments: 0.0)
    monkeypatch.setenv("COLUMNS", "80")
    doctor_module.examine()
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    doctor_module.examine()
    colored = capsys.readouterr().out
    assert "\x1b[1;32mPASS\x1b[0m" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    doctor_module.examine()
    assert capsys.readouterr().out == plain


@pytest.mark.parametrize("kind", ["exact", "sketched"])
@pytest.mark.parametrize("factor", [10, float("nan")])
def test_doctor_fails_where_angles_are_wrong(kind, factor, monkeypatch):
    def error(backend, device, buckets):
        limit = EXACT_LIMIT if buckets is None else SKETCH_LIMIT
        return factor * limit if (buckets is None) == (kind == "exact") else 0.0

    monkeypatch.setattr(doctor_module, "largest_error", error)
    result = run("doctor")
    assert result.exit_code == 1
    assert result.output.count("measures angles that are") >= 2
    assert "PASS" not in result.output


def test_doctor_reports_a_backend_that_crashes(monkeypatch):
    def crash(backend, device, buckets):
        raise RuntimeError("no [kernel] image")

    monkeypatch.setattr(doctor_module, "largest_error", crash)
    result = run("doctor")
    assert result.exit_code == 1
    assert "FAIL: RuntimeError: no [kernel] image" in result.output
    assert "backend cpu does not run on cpu" in " ".join(result.output.split())


def test_doctor_without_the_core(monkeypatch):
    monkeypatch.setitem(sys.modules, "autodrop_ext._C", None)
    result = run("doctor")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "loads NO: " in " ".join(result.output.split())
    assert "pip install -e ." in result.output  # these tests run in a checkout
    assert "FAIL: the compiled core does not load" in result.output


@pytest.mark.parametrize("wrong", [lambda angle: angle + 0.03, lambda angle: None])
def test_selftest_notices_a_wrong_angle(wrong, monkeypatch):
    assert largest_error("reference", "cpu", None) < EXACT_LIMIT
    assert largest_error("reference", "cpu", 4096) < SKETCH_LIMIT
    observe = AngularVelocity.observe

    def observe_wrongly(meter, **keywords):
        reading = observe(meter, **keywords)
        return reading and dataclasses.replace(reading, angle=wrong(reading.angle))

    monkeypatch.setattr(AngularVelocity, "observe", observe_wrongly)
    assert largest_error("reference", "cpu", None) > EXACT_LIMIT


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(
        '{"event": "reading", "step": 6, "angle": 80.0, "lr": [0.1], "dropped": false}\n'
        '{"event": "metrics", "step": 6, "loss": 0.5}\n'
        '{"event": "reading", "step": 8, "angle": null, "lr": [0.09], "dropped": true}\n'
    )
    return path


def test_plot_writes_beside_the_log_or_where_told(log, tmp_path):
    result = run("plot", log)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'run.png'}: 2 readings, 1 drop\n"
    assert "does not have the run's threshold" in result.stderr
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert run("plot", log, "-o", tmp_path / "other.svg", "--threshold", 1).exit_code == 0
    assert (tmp_path / "other.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no readings"),
        (b'{"event": "metrics", "step": 1}\n', "no readings"),
        (b"broken\n\n", "no readings"),
        (b'{"event": "other"}\n', "run.jsonl:1: expected a reading or metrics"),
        (b'{"event": "reading", "angle": 80.0}\n', "'step'"),
        (b'{"event": "reading", "step": 1, "angle": "x"}\n', "'x'"),
        (b"\xff\xfe\x00", "no readings"),
        (b'"' + b"x" * 10_000 + b'"\n\n', "run.jsonl:1: expected a reading or metrics"),
        (b'{"event": "reading", "step": 1, "angle": "' + b"x" * 10_000 + b'"}\n', " ..."),
    ],
)
def test_plot_refuses_a_broken_log_in_one_line(content, expected, log):
    log.write_bytes(content)
    error = one_line_error(run("plot", log))
    assert expected in error
    assert len(error) < 500


def test_plot_refuses_what_it_cannot_read_or_write(log, tmp_path):
    assert "does not exist" in one_line_error(run("plot", tmp_path / "none.jsonl"))
    assert "none/a.png" in one_line_error(run("plot", log, "--output", tmp_path / "none/a.png"))
    assert "xyz" in one_line_error(run("plot", log, "--output", tmp_path / "a.xyz"))


def test_plot_without_matplotlib_names_the_extra(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'autodrop_ext[plot]'" in one_line_error(run("plot", log))


def test_version_and_help():
    assert run("--version").output == f"autodrop_ext, version {autodrop_ext.__version__}\n"
    output = run("--help").output
    assert all(command in output for command in ("doctor", "plot"))
    for command in ("doctor", "plot"):
        assert run(command, "--help").exit_code == 0


def test_without_click_the_extra_is_named(monkeypatch):
    from autodrop_ext.cli import main

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["autodrop", "plot"])
    with pytest.raises(SystemExit, match=r"needs click: .*autodrop_ext\[cli\]"):
        main()


def test_doctor_does_not_need_click():
    script = "import sys; sys.modules.update(click=None); import runpy; "
    script += "sys.argv = ['autodrop', 'doctor']; "
    script += "runpy.run_module('autodrop_ext', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("doctor").output
    assert done.stderr == ""


def test_runs_as_a_module():
    command = [sys.executable, "-m", "autodrop_ext", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"autodrop_ext, version {autodrop_ext.__version__}\n"
