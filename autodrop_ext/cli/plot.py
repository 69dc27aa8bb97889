"""``autodrop plot``: a picture of one log, or of several together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..log import LoggedRun, read_log
from ..plotting.compare import plot_runs
from ..plotting.run import plot_run
from ..plotting.titles import count, count_drops, describe, kind_of, printable


def draw(logs: Sequence[Path], output: Path | None = None) -> list[str]:
    """Draw one log, or several into one picture.

    Args:
        logs: Files that ``JsonLinesLog`` wrote.
        output: The picture; by default next to the log, or ``comparison.png``.

    Returns:
        Lines that say what was drawn.

    Raises:
        ValueError: A log was given twice or holds no readings, or a line is no record.
        OSError: A log cannot be read, or the picture not be written.
        ImportError: matplotlib is not installed.
    """
    if len(set(logs)) < len(logs):
        raise ValueError("LOG: expected different logs, got one twice")
    names = [log.stem for log in logs]
    if len(set(names)) < len(names):
        names = [str(log.with_suffix("")) for log in logs]
    runs = [_read(log) for log in logs]
    counts = [_counts(run) for run in runs]
    if len(logs) == 1:
        target = output or logs[0].with_suffix(".png")
        plot_run(*runs[0], name=names[0], path=target)
        return [f"{target}: {counts[0]}"]
    target = output or Path("comparison.png")
    labels = _with_settings(names, runs)
    plot_runs({label: run[:2] for label, run in zip(labels, runs, strict=True)}, path=target)
    return [f"{target}:", *(f"  {n}: {c}" for n, c in zip(names, counts, strict=True))]


def _read(log: Path) -> LoggedRun:
    run = read_log(log)
    if not run.readings:
        raise ValueError(f"{log}: no readings; the first is written when the third window ends")
    return run


def _counts(run: LoggedRun) -> str:
    readings = count(len(run.readings), "reading")
    if kind_of(run.readings) == "growing":  # Its rate falls at nearly every reading.
        return readings
    return f"{readings}, {count_drops(run.readings)}"


def _with_settings(names: Sequence[str], runs: Sequence[LoggedRun]) -> list[str]:
    """Return the names together with those settings in which the runs differ."""
    keys = {key for run in runs for key in run.settings if key != "version"}
    differing = {k for k in keys if any(r.settings.get(k) != runs[0].settings.get(k) for r in runs)}
    of_each = [describe({k: v for k, v in r.settings.items() if k in differing}) for r in runs]
    return [
        printable(f"{name} ({text})" if text else name)
        for name, text in zip(names, of_each, strict=True)
    ]
