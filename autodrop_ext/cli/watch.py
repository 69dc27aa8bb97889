"""``autodrop watch``: a log as it grows."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..log import LogReader
from .live_view import render
from .plot import explain

_LOGS_ERRORS = (AttributeError, LookupError, OSError, TypeError, ValueError)


@click.command()
@click.argument("log", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two looks at the log.",
)
@click.option("--once", is_flag=True, help="Show the log as it is now, and end.")
def watch(log: Path, interval: float, once: bool) -> None:
    """Show a running log in the terminal; Ctrl-C ends it.

    LOG is a file that JsonLinesLog writes; the command waits for it if it does not exist yet. Where
    the output is no terminal, the log is shown once.
    """
    console = Console(highlight=False)
    reader = LogReader(log)
    if once or not console.is_terminal:
        if not log.exists():
            raise click.ClickException(f"{log} does not exist")
        console.print(_look(reader, console.width))
        return
    # The alternate screen would be gone at the end, with the last state of the run.
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                view = _look(reader, console.width)
                live.update(
                    Group(view, "", Text("Ctrl-C ends this view", style="dim")), refresh=True
                )
                time.sleep(interval)
        except KeyboardInterrupt:
            live.update(_look(reader, console.width), refresh=True)


def _look(reader: LogReader, width: int) -> RenderableType:
    try:
        reader.poll()
        if not reader.path.exists():
            return Text(f"Waiting for {reader.path} ...")
        silent = max(0.0, time.time() - reader.path.stat().st_mtime)
        return render(reader.path.name, reader.readings, reader.metrics, width=width, silent=silent)
    except _LOGS_ERRORS as error:
        raise click.ClickException(explain(reader.path, error)) from error
