"""``autodrop watch``: the newest state of a log, as it grows, in the width of a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..log import LogReader, of_epochs
from .plot import count, explain

_BLOCKS = "▁▂▃▄▅▆▇█"
_NEWEST = 6  # readings in the table
_LABEL = 9  # columns for a curve's name
_VALUE = 11  # columns for its newest value
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


def render(
    name: str,
    readings: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    *,
    width: int,
    silent: float | None = None,
) -> RenderableType:
    """The view of a log.

    Args:
        name: of the log.
        readings: as :class:`~autodrop_ext.log.LogReader` has them.
        metrics: likewise; a ``loss`` among them gets a curve.
        width: columns.
        silent: seconds since the log has grown; None where that is unknown.
    """
    lines: list[RenderableType] = [_head(name, readings, metrics, silent)]
    losses = [m for m in metrics if m.get("loss") is not None]
    room = max(10, width - _LABEL - _VALUE - 1)
    if losses:
        lines += ["", _curve("loss", [float(m["loss"]) for m in losses], room, _four)]
    if not readings:
        lines += ["", "No readings yet: the first comes at the end of the third window."]
        return Group(*lines)
    epochs = of_epochs(readings)
    smoothed = "angle" if epochs else "smoothed"
    lines += [
        "",
        _curve("angle", [_number(r.get("angle")) for r in readings], room, _degrees),
        _curve(smoothed, [_number(r.get(smoothed)) for r in readings], room, _degrees)
        if not epochs
        else _curve("change", [_number(r.get("change")) for r in readings], room, _degrees),
        _curve("rate", [_first_rate(r) for r in readings], room, _three),
        _drops(readings, room),
        "",
        _newest(readings, epochs),
    ]
    return Group(*lines)


def _head(
    name: str,
    readings: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    silent: float | None,
) -> Text:
    steps = [int(r["step"]) for r in (*readings[-1:], *metrics[-1:])]
    drops = sum(bool(r.get("dropped")) for r in readings)
    text = Text(name, style="bold")
    if steps:
        text.append(f"   step {max(steps):,}", style="not bold")
    if readings:
        text.append(f"   {count(len(readings), 'reading')}", style="not bold")
        text.append(f"   {count(drops, 'drop')}", style="not bold")
    if silent is not None:
        text.append(f"   grew {_ago(silent)} ago", style="not bold dim")
    return text


def _ago(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def _curve(label: str, values: Sequence[float], room: int, form: Callable[[float], str]) -> Text:
    """A name, one character for each part of the run, and the newest value."""
    bars = _sparkline(_means(values, room))
    newest = next((v for v in reversed(values) if math.isfinite(v)), math.nan)
    text = Text(f"{label:<{_LABEL}}", style="bold", no_wrap=True)
    text.append(f"{bars:<{room}}", style="not bold blue")
    text.append(f"{form(newest):>{_VALUE}}" if math.isfinite(newest) else "", style="not bold")
    return text


def _drops(readings: Sequence[Mapping[str, Any]], room: int) -> Text:
    marks = "".join(
        "▼" if any(r.get("dropped") for r in part) else " " for part in _parts(readings, room)
    )
    text = Text(f"{'drops':<{_LABEL}}", style="bold", no_wrap=True)
    text.append(marks, style="not bold red")
    return text


def _parts(values: Sequence[Any], room: int) -> list[Sequence[Any]]:
    """At most ``room`` runs of neighbours, as equal in length as can be."""
    count = min(room, len(values))
    cuts = [i * len(values) // count for i in range(count + 1)]
    return [values[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def _means(values: Sequence[float], room: int) -> list[float]:
    means = []
    for part in _parts(values, room):
        finite = [v for v in part if math.isfinite(v)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return means


def _sparkline(values: Sequence[float]) -> str:
    """Heights between the lowest and the highest; a gap where there is no value."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return " " * len(values)
    lowest, highest = min(finite), max(finite)
    # Losses and rates fall by orders of magnitude; on a linear scale all but the first are flat.
    if lowest > 0 and highest > 5 * lowest:
        values = [math.log(v) if v > 0 else v for v in values]
        lowest, highest = math.log(lowest), math.log(highest)
    span = highest - lowest
    heights = [
        None if not math.isfinite(v) else round((v - lowest) / span * 7) if span else 0
        for v in values
    ]
    return "".join(" " if h is None else _BLOCKS[h] for h in heights)


def _newest(readings: Sequence[Mapping[str, Any]], epochs: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    columns = ("change", "threshold", "waited") if epochs else ("smoothed", "rise")
    for head in ("step", "epoch" if epochs else "window", "angle", *columns, "rate"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for reading in readings[-_NEWEST:]:
        cells = [f"{int(reading['step']):,}", _cell(reading.get("window"), lambda w: f"{w:,.0f}")]
        cells.append(_cell(reading.get("angle"), _degrees))
        for name in columns:
            form = _degrees if name != "waited" else _three
            cells.append(_cell(reading.get(name), _signed if name == "rise" else form))
        cells.append(_cell(_first_rate(reading), _three))
        dropped = bool(reading.get("dropped"))
        cells.append("dropped" if dropped else "averaged" if reading.get("averaged") else "")
        table.add_row(*cells, style="red" if dropped else None)
    return table


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _first_rate(reading: Mapping[str, Any]) -> float:
    rates = reading.get("lr") or ()
    return _number(rates[0]) if rates else math.nan


def _cell(value: Any, form: Callable[[float], str]) -> str:
    number = _number(value)
    return form(number) if math.isfinite(number) else "-"


def _degrees(value: float) -> str:
    return f"{value:.2f}°"


def _signed(value: float) -> str:
    return f"{value:+.2f}°"


def _three(value: float) -> str:
    return f"{value:.3g}"


def _four(value: float) -> str:
    return f"{value:.4g}"
