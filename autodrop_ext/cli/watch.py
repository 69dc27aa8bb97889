"""``autodrop watch``: the newest state of a log, as it grows, in the width of a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..log import LogReader, kind_of
from ..plotting.panels import Record, column, mean, number
from ..plotting.titles import count, describe
from .plot import BROKEN, explain, printable

Form = Callable[[float], str]

_BLOCKS = "▁▂▃▄▅▆▇█"
_NEWEST = 6  # readings in the table
_LABEL = 9  # columns for a curve's name
_VALUE = 11  # columns for its newest value
_SHORTEST = 5  # columns of a curve; in fewer there is only its newest value
_GAP = 3  # columns between those of the table


@click.command()
@click.argument("log", type=click.Path(path_type=Path))
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

    LOG is a file that JsonLinesLog writes; the command waits for it if it does not exist yet. If
    the output is no terminal, the log is shown once.
    """
    console = Console(highlight=False)
    reader = LogReader(log)
    if once or not console.is_terminal:
        if not log.exists():
            raise click.ClickException(printable(f"{log} does not exist"))
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
            return Text(printable(f"Waiting for {reader.path} ..."))
        silent = max(0.0, time.time() - reader.path.stat().st_mtime)
        return render(reader, width=width, silent=silent)
    except BROKEN as error:
        raise click.ClickException(explain(reader.path, error)) from error


def render(reader: LogReader, *, width: int, silent: float | None = None) -> RenderableType:
    """Return the view of a log.

    Args:
        reader: What has been read of it.
        width: The columns of the terminal.
        silent: Seconds since the last line of the log, or None if that is unknown.
    """
    readings = reader.readings
    lines: list[RenderableType] = [_head(reader, silent)]
    settings = describe(reader.settings)
    if settings:
        lines.append(Text(printable(settings), style="dim"))
    lines.append("")
    losses = [m for m in reader.metrics if m.get("loss") is not None]
    curve = _Curves([*losses, *readings], _room(width))
    if losses:
        lines += [curve.line("loss", losses, column(losses, "loss"), _four), ""]
    if not readings:
        lines.append("No readings yet: the first comes at the end of the third window.")
        return Group(*lines)
    kind = kind_of(readings)
    if kind == "anytime":
        for name, label, form in (("cosine", "cosine", _two), ("power", "exponent", _two)):
            lines.append(curve.line(label, readings, column(readings, name), form))
    else:
        lines.append(curve.line("angle", readings, column(readings, "angle"), _degrees))
        second = "change" if kind == "epochs" else "smoothed"
        lines.append(curve.line(second, readings, column(readings, second), _degrees))
    lines.append(curve.line("rate", readings, [_first_rate(r) for r in readings], _three))
    if kind != "anytime" and _room(width):
        lines.append(curve.drops(readings))
    return Group(*lines, "", _newest(readings[-_NEWEST:], kind, width))


def _head(reader: LogReader, silent: float | None) -> Text:
    readings = reader.readings
    steps = [int(r["step"]) for r in (*readings[-1:], *reader.metrics[-1:])]
    text = Text(printable(reader.path.name), style="bold")
    if steps:
        text.append(f"   step {max(steps):,}", style="not bold")
    if readings:
        text.append(f"   {count(len(readings), 'reading')}", style="not bold")
    if kind_of(readings) != "anytime" and readings:  # whose rate falls at nearly every reading
        drops = sum(bool(r.get("dropped")) for r in readings)
        text.append(f"   {count(drops, 'drop')}", style="not bold")
    if silent is not None:
        text.append(f"   last written {_ago(silent)} ago", style="not bold dim")
    return text


def _ago(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def _room(width: int) -> int:
    """Columns for a curve between its name and its newest value; 0 if there are too few."""
    room = width - _LABEL - _VALUE - 1
    return room if room >= _SHORTEST else 0


class _Curves:
    """Lines of characters that share an axis of steps, from the first to the last record.

    Args:
        records: Everything that is shown.
        room: Columns of a curve; 0 if there are too few.
    """

    def __init__(self, records: Sequence[Record], room: int) -> None:
        steps = [int(record["step"]) for record in records]
        self._first = min(steps, default=0)
        self._span = max(steps, default=0) - self._first + 1
        self._room = room

    def _parts(self, records: Sequence[Record], values: Sequence[Any]) -> list[list[Any]]:
        """The values of each column."""
        parts: list[list[Any]] = [[] for _ in range(self._room)]
        for record, value in zip(records, values, strict=True):
            parts[(int(record["step"]) - self._first) * self._room // self._span].append(value)
        return parts

    def line(
        self, label: str, records: Sequence[Record], values: Sequence[float], form: Form
    ) -> Text:
        """A name, a character for each column, and the newest value.

        Columns without a record have the value of the one before, up to the newest record.
        """
        newest = next((v for v in reversed(values) if math.isfinite(v)), math.nan)
        text = Text(f"{label:<{_LABEL}}", style="bold", no_wrap=True)
        if self._room:
            parts = self._parts(records, values)
            means: list[float] = []
            for part in parts[: max((i + 1 for i, part in enumerate(parts) if part), default=0)]:
                means.append(mean(part) if part else means[-1] if means else math.nan)
            text.append(f"{_sparkline(means):<{self._room}}", style="not bold blue")
        text.append(f"{form(newest):>{_VALUE}}" if math.isfinite(newest) else "", style="not bold")
        return text

    def drops(self, readings: Sequence[Record]) -> Text:
        """A mark in each column with a drop."""
        marks = "".join(
            "▼" if any(part) else " "
            for part in self._parts(readings, [bool(r.get("dropped")) for r in readings])
        )
        text = Text(f"{'drops':<{_LABEL}}", style="bold", no_wrap=True)
        text.append(marks, style="not bold red")
        return text


def _sparkline(values: Sequence[float]) -> str:
    """Heights between the lowest and the highest value; a gap if there is no value."""
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


def _newest(readings: Sequence[Record], kind: str, width: int) -> Table:
    """The newest readings, without the columns that a narrow terminal has no room for."""
    columns = {name: [cell(r) for r in readings] for name, cell in _cells(kind)}
    marks = [_mark(r) for r in readings]
    if kind != "anytime" and any(marks):
        columns[""] = marks
    for name in _LEAST_IMPORTANT:
        widths = [max(map(len, [head, *cells])) for head, cells in columns.items()]
        if sum(widths) + _GAP * (len(widths) - 1) <= width:
            break
        columns.pop(name, None)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for head in columns:
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for reading, *cells in zip(readings, *columns.values(), strict=True):
        dropped = kind != "anytime" and reading.get("dropped")
        table.add_row(*cells, style="red" if dropped else None)
    return table


_LEAST_IMPORTANT = (
    *("window", "epoch", "threshold", "mean", "smoothed", "waited", "change", "rise"),
    *("", "cosine", "angle", "exponent"),
)


def _cells(kind: str) -> Iterator[tuple[str, Callable[[Record], str]]]:
    """Heads of the table's columns, and what each makes of a reading."""

    def of(key: str, form: Form) -> Callable[[Record], str]:
        return lambda reading: _cell(number(reading.get(key)), form)

    yield "step", lambda reading: f"{int(reading['step']):,}"
    if kind == "anytime":
        yield "window", of("window_steps", _whole)
        yield "cosine", of("cosine", _two)
        yield "mean", of("mean_cosine", _two)
        yield "exponent", of("power", _two)
    else:
        yield "epoch" if kind == "epochs" else "window", of("window", _whole)
        yield "angle", of("angle", _degrees)
    if kind == "epochs":
        yield "change", of("change", _degrees)
        yield "threshold", of("threshold", _degrees)
        yield "waited", of("waited", _three)
    elif kind == "windows":
        yield "smoothed", of("smoothed", _degrees)
        yield "rise", of("rise", _signed)
    yield "rate", lambda reading: _cell(_first_rate(reading), _three)


def _mark(reading: Mapping[str, Any]) -> str:
    return "dropped" if reading.get("dropped") else "averaged" if reading.get("averaged") else ""


def _first_rate(reading: Mapping[str, Any]) -> float:
    rates = reading.get("lr") or ()
    return number(rates[0]) if rates else math.nan


def _cell(value: float, form: Form) -> str:
    return form(value) if math.isfinite(value) else "-"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _degrees(value: float) -> str:
    return f"{value:.2f}°"


def _signed(value: float) -> str:
    return f"{value:+.2f}°"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _three(value: float) -> str:
    return f"{value:.3g}"


def _four(value: float) -> str:
    return f"{value:.4g}"
