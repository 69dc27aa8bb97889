"""``autodrop plot``: a picture of one log, or of several together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from ..log import LoggedRun, read_run
from ..plotting.anytime import plot_anytime
from ..plotting.compare import plot_runs
from ..plotting.epochs import plot_epochs
from ..plotting.panels import Record
from ..plotting.run import plot_run
from ..plotting.titles import count, describe, title_of

# What a log that JsonLinesLog did not write may lead to.
_BROKEN = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)
_LONGEST = 300  # characters of an error message


@click.command()
@click.argument("logs", metavar="LOG...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The picture; its ending gives the format.  [default: LOG with the ending .png; of "
    "several, comparison.png]",
)
@click.option(
    "--threshold",
    type=float,
    help="Threshold of the run, in degrees per window, for a log without settings.",
)
def plot(logs: tuple[Path, ...], output: Path | None, threshold: float | None) -> None:
    """Draw the log of a run: when its learning rate dropped, and why.

    LOG is a file that JsonLinesLog wrote, of any scheduler of this package. Several are drawn into
    one picture, to be compared.
    """
    names = _names(logs)
    runs = [_read(log) for log in logs]
    several = len(logs) > 1
    if threshold is not None and several:
        raise click.UsageError("--threshold: expected none with several logs")
    target = output or (Path("comparison.png") if several else logs[0].with_suffix(".png"))
    try:
        if several:
            labels = _with_settings(names, runs)
            plot_runs(
                {label: run[1:] for label, run in zip(labels, runs, strict=True)}, path=target
            )
        else:
            _draw(names[0], runs[0], target, threshold)
    except (ImportError, *_BROKEN) as error:
        raise _failure(logs[0], error) from error
    counts = [_counts(run) for run in runs]
    rows = [f"  {name}: {counted}" for name, counted in zip(names, counts, strict=True)]
    for line in [f"{target}:", *rows] if several else [f"{target}: {counts[0]}"]:
        click.echo(printable(line))


def _read(log: Path) -> LoggedRun:
    if not log.exists():
        raise click.ClickException(printable(f"{log} does not exist"))
    try:
        run = read_run(log)
    except _BROKEN as error:
        raise _failure(log, error) from error
    if not run.readings:
        raise click.ClickException(
            printable(f"{log} holds no readings; ")
            + "the first is written at the end of the third window"
        )
    return run


def _draw(name: str, run: LoggedRun, target: Path, threshold: float | None) -> None:
    kind = kind_of(run.readings)
    if threshold is not None and kind != "windows":
        raise click.UsageError("--threshold: expected none, the log has it with every reading")
    title = printable(title_of(run.settings, run.readings, name, metrics=run.metrics))
    if kind == "epochs":
        plot_epochs(run.readings, path=target, title=title)
    elif kind == "anytime":
        critical = run.settings.get("critical")
        plot_anytime(run.readings, run.metrics, critical=critical, path=target, title=title)
    else:
        threshold = run.settings.get("threshold") if threshold is None else threshold
        if threshold is None:
            click.echo("The log does not have the run's threshold; --threshold draws it.", err=True)
        plot_run(run.readings, run.metrics, threshold=threshold, path=target, title=title)


def kind_of(readings: Sequence[Record]) -> Literal["windows", "epochs", "anytime"]:
    """Return what the readings of a log are about.

    ``EpochAutoDrop`` has one for each epoch, ``AnytimeAutoDrop`` one for each of its growing
    windows, and the others one for each window.
    """
    names = {name for reading in readings for name in reading}
    return "epochs" if "waited" in names else "anytime" if "power" in names else "windows"


def _counts(run: LoggedRun) -> str:
    readings = count(len(run.readings), "reading")
    if kind_of(run.readings) == "anytime":  # Its rate falls at nearly every reading.
        return readings
    return f"{readings}, {count(sum(bool(r.get('dropped')) for r in run.readings), 'drop')}"


def _names(logs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ, without ``.jsonl``.

    Raises:
        click.UsageError: The same log was given twice.
    """
    paths = [log.resolve() for log in logs]
    if len(set(paths)) < len(paths):
        raise click.UsageError("LOG: expected different logs, got one twice")
    # Only endings that are all the same say nothing.
    same_ending = all(path.suffix == ".jsonl" for path in paths)
    parts = [(path.with_suffix("") if same_ending else path).parts for path in paths]
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return [str(Path(*path[-length:])) for path in parts]


def _with_settings(names: Sequence[str], runs: Sequence[LoggedRun]) -> list[str]:
    """Return the names together with those settings in which the runs differ."""
    keys = {key for run in runs for key in run.settings if key != "version"}
    differing = {k for k in keys if any(r.settings.get(k) != runs[0].settings.get(k) for r in runs)}
    of_each = [describe({k: v for k, v in r.settings.items() if k in differing}) for r in runs]
    return [
        printable(f"{name} ({text})" if text else name)
        for name, text in zip(names, of_each, strict=True)
    ]


def printable(text: str) -> str:
    r"""Return the text with escapes such as ``\x1b`` for what would control a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _failure(log: Path, error: Exception) -> click.ClickException:
    """Return an error in one line; a broken log may quote a line of any length."""
    text = " ".join(str(error).split())
    if not isinstance(error, (ImportError, OSError, ValueError)):
        text = f"{log}: a record is not as JsonLinesLog writes it: {text}"
    text = printable(text)
    return click.ClickException(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...")
