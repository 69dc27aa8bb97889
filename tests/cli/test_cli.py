"""cli: every command in small, and what users see when something is wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import autodrop_ext
from autodrop_ext import AngularVelocity
from autodrop_ext.cli import doctor as doctor_module
from autodrop_ext.cli import main
from autodrop_ext.cli.doctor import EXACT_LIMIT, SKETCH_LIMIT, largest_error


def error_of(*arguments):
    """The message that a command ends with; nothing but an exit is raised."""
    with pytest.raises(SystemExit) as error:
        main([str(a) for a in arguments])
    assert isinstance(error.value.code, str)
    assert "\n" not in error.value.code
    return error.value.code


@pytest.fixture
def examined(capsys):
    """A function that returns the status and the output of the doctor."""

    def examine():
        with pytest.raises(SystemExit) as ended:
            main(["doctor"])
        return ended.value.code, capsys.readouterr().out

    return examine


def test_doctor_passes_and_says_what_is_here(examined):
    status, output = examined()
    assert status == 0, output
    for expected in (autodrop_ext.__version__, torch.__version__):
        assert expected in output
    assert "  cpu, on cpu         works\n" in output
    assert "  cpu, on cpu         PASS, " in output
    assert output.splitlines()[-1].startswith("PASS")
    assert "FAIL" not in output


@pytest.mark.parametrize("kind", ["exact", "sketched"])
@pytest.mark.parametrize("factor", [10, float("nan")])
def test_doctor_fails_where_angles_are_wrong(kind, factor, monkeypatch, examined):
    def error(backend, device, buckets):
        limit = EXACT_LIMIT if buckets is None else SKETCH_LIMIT
        return factor * limit if (buckets is None) == (kind == "exact") else 0.0

    monkeypatch.setattr(doctor_module, "largest_error", error)
    status, output = examined()
    assert status == 1
    assert output.count("measures angles that are") >= 2
    assert "PASS" not in output


def test_doctor_reports_a_backend_that_crashes(monkeypatch, examined):
    def crash(backend, device, buckets):
        raise RuntimeError("no [kernel] image")

    monkeypatch.setattr(doctor_module, "largest_error", crash)
    status, output = examined()
    assert status == 1
    assert "FAIL: RuntimeError: no [kernel] image" in output
    assert "backend cpu does not run on cpu" in output


def test_doctor_without_the_core(monkeypatch, examined):
    monkeypatch.setitem(sys.modules, "autodrop_ext._C", None)
    status, output = examined()
    assert status == 1
    assert "loads               NO: " in output
    assert "pip install -e ." in output  # these tests run in a checkout
    assert "FAIL: the compiled core does not load" in output


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


def test_plot_writes_next_to_the_log_or_where_output_says(log, tmp_path, capsys):
    main(["plot", str(log)])
    assert capsys.readouterr().out == f"{tmp_path / 'run.png'}: 2 readings, 1 drop\n"
    assert (tmp_path / "run.png").stat().st_size > 10_000
    main(["plot", str(log), "-o", str(tmp_path / "other.svg")])
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
        (b'{"event": "reading", "step": 1, "angle": "' + b"x" * 10_000 + b'"}\n', "float"),
    ],
)
def test_plot_refuses_a_broken_log_in_one_line(content, expected, log):
    log.write_bytes(content)
    error = error_of("plot", log)
    assert expected in error
    assert len(error) < 500


def test_plot_refuses_what_it_cannot_read_or_write(log, tmp_path):
    assert "No such file" in error_of("plot", tmp_path / "none.jsonl")
    assert "none/a.png" in error_of("plot", log, "--output", tmp_path / "none/a.png")
    assert "xyz" in error_of("plot", log, "--output", tmp_path / "a.xyz")
    assert "got one twice" in error_of("plot", log, log)


def test_plot_without_matplotlib_names_the_extra(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'autodrop_ext[plot]'" in error_of("plot", log)


def test_version_and_help(capsys):
    for arguments in (["--help"], ["doctor", "--help"], ["plot", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    output = capsys.readouterr().out
    assert all(text in output for text in ("doctor", "plot", "LOG", "--output"))


def test_runs_as_a_module():
    command = [sys.executable, "-m", "autodrop_ext", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"autodrop_ext, version {autodrop_ext.__version__}\n"
