"""``autodrop plot``: a picture of a log."""

from __future__ import annotations

from pathlib import Path

import click

from ..log import read_log
from ..plotting import plot_run

_LONGEST = 300  # characters of an error message


@click.command()
@click.argument("log", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The picture; its ending gives the format.  [default: LOG with the ending .png]",
)
@click.option(
    "--threshold",
    type=float,
    default=0.1,
    show_default=True,
    help="Threshold of the run, in degrees per window; it is not part of the log.",
)
def plot(log: Path, output: Path | None, threshold: float) -> None:
    """Draw the log of a run: when its learning rate dropped, and why.

    LOG is a file that JsonLinesLog wrote.
    """
    target = log.with_suffix(".png") if output is None else output
    try:
        readings, metrics = read_log(log)
        if not readings:
            raise click.ClickException(
                f"{log} holds no readings; the first is written at the end of the third window"
            )
        plot_run(readings, metrics, threshold=threshold, path=target, title=log.name)
    except (ImportError, LookupError, OSError, TypeError, ValueError) as error:
        raise click.ClickException(_explain(log, error)) from error
    drops = sum(bool(reading.get("dropped")) for reading in readings)
    click.echo(f"{target}: {_count(len(readings), 'reading')}, {_count(drops, 'drop')}")


def _explain(log: Path, error: Exception) -> str:
    """One line; a broken log may quote a line of any length."""
    text = " ".join(str(error).split())
    if isinstance(error, (LookupError, TypeError)):
        text = f"{log}: a record is not as JsonLinesLog writes it: {text}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
