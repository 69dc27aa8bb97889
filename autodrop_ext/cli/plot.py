"""``autodrop plot``: a picture of one log, or of several together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..log import of_epochs, read_log
from ..plotting.compare import plot_runs
from ..plotting.epochs import plot_epochs
from ..plotting.run import plot_run

_LONGEST = 300  # characters of an error message


@click.command()
@click.argument(
    "logs",
    metavar="LOG...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The picture; its ending gives the format.  [default: LOG with the ending .png; of "
    "several, comparison.png]",
)
@click.option(
    "--threshold",
    type=float,
    help="Threshold of the run, in degrees per window; it is not part of the log.  [default: 0.1]",
)
def plot(logs: tuple[Path, ...], output: Path | None, threshold: float | None) -> None:
    """Draw the log of a run: when its learning rate dropped, and why.

    LOG is a file that JsonLinesLog wrote, of AutoDrop or of EpochAutoDrop. Several are drawn into
    one picture, to be compared.
    """
    runs = {name: _read(log) for name, log in zip(_names(logs), logs, strict=True)}
    try:
        if len(logs) > 1:
            if threshold is not None:
                raise click.UsageError("--threshold: expected none with several logs")
            target = Path("comparison.png") if output is None else output
            plot_runs(runs, path=target)
        else:
            ((readings, metrics),) = runs.values()
            target = logs[0].with_suffix(".png") if output is None else output
            if of_epochs(readings):
                if threshold is not None:
                    raise click.UsageError("--threshold: expected none, the log of epochs has it")
                plot_epochs(readings, path=target)
            else:
                threshold = 0.1 if threshold is None else threshold
                plot_run(readings, metrics, threshold=threshold, path=target, title=logs[0].name)
    except (ImportError, LookupError, OSError, TypeError, ValueError) as error:
        raise click.ClickException(explain(logs[0], error)) from error
    counts = [
        (len(readings), sum(bool(reading.get("dropped")) for reading in readings))
        for readings, _ in runs.values()
    ]
    if len(logs) == 1:
        click.echo(f"{target}: {count(counts[0][0], 'reading')}, {count(counts[0][1], 'drop')}")
        return
    click.echo(f"{target}:")
    for name, (readings_, drops) in zip(runs, counts, strict=True):
        click.echo(f"  {name}: {count(readings_, 'reading')}, {count(drops, 'drop')}")


def _read(log: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        readings, metrics = read_log(log)
    except (OSError, ValueError) as error:
        raise click.ClickException(explain(log, error)) from error
    if not readings:
        raise click.ClickException(
            f"{log} holds no readings; the first is written at the end of the third window"
        )
    return readings, metrics


def _names(logs: tuple[Path, ...]) -> list[str]:
    """The shortest ends of the paths that tell them apart: run.jsonl, or a/run.jsonl, b/run.jsonl.

    Raises:
        click.UsageError: the same log was given twice.
    """
    paths = [log.resolve().parts for log in logs]
    if len(set(paths)) < len(paths):
        raise click.UsageError("LOG: expected different logs, got one twice")
    length = 1
    while len({path[-length:] for path in paths}) < len(paths):
        length += 1
    return [str(Path(*path[-length:])) for path in paths]


def explain(log: Path, error: Exception) -> str:
    """One line; a broken log may quote a line of any length."""
    text = " ".join(str(error).split())
    if isinstance(error, (AttributeError, LookupError, TypeError)):
        text = f"{log}: a record is not as JsonLinesLog writes it: {text}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
