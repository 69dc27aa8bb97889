"""A run's log: JSON lines that grow while the run goes on, and where else decisions may go."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TextIO

import torch

from .reading import Decision

_BEGINNING = b'{"event": "'


class LogSink(Protocol):
    """What takes a run's decisions: any function that takes a :class:`Decision` will do.

    The sinks of this package also have ``metrics(step, **values)``, for values of one's own such as
    a loss, and ``close()``.
    """

    def __call__(self, decision: Decision, /) -> object:
        """Take the decision of a window that has ended."""


def is_first_rank() -> bool:
    """Whether this process is the one that writes logs: all ranks come to the same decisions."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0


def to_scalars(decision: Decision) -> dict[str, float]:
    """A decision as numbers by name, for loggers of scalars: undefined ones left out.

    Truth values become 0 and 1. The rate of a single param group is ``lr``; of several,
    ``lr/0``, ``lr/1`` and so on. Angles of param groups that decide for themselves are
    ``group_angles/0`` and so on; those of single tensors are left to :class:`JsonLinesLog`.
    """
    scalars: dict[str, float] = {}
    for name, value in decision.as_dict().items():
        if name == "lr":
            names = ["lr"] if len(value) == 1 else [f"lr/{i}" for i in range(len(value))]
            scalars |= dict(zip(names, map(float, value), strict=True))
        elif name.startswith("group_"):
            scalars |= {f"{name}/{g}": float(v) for g, v in enumerate(value) if v is not None}
        elif isinstance(value, (int, float)) and name != "step":
            scalars[name] = float(value)
    return scalars


class JsonLinesLog:
    """Appends one JSON object a line to a file; give it to ``AutoDrop`` as ``on_reading=``.

    Lines with ``"event": "reading"`` hold a :class:`Decision`; lines with ``"event": "metrics"``
    hold whatever :meth:`metrics` is given. Every line is flushed, so that a killed run keeps its
    log; a resumed run appends, after cutting off a line that was left unfinished. Of several ranks
    the first one writes.

    Args:
        path: of the file; it is made with the first line.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        self._file: TextIO | None = None

    def __call__(self, decision: Decision) -> None:
        """Write a decision."""
        self._write({"event": "reading", **decision.as_dict()})

    def metrics(self, step: int, **values: float) -> None:
        """Write values of your own, such as ``loss``, at an optimizer step."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._write({"event": "metrics", "step": step, **finite})

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: dict[str, Any]) -> None:
        if not is_first_rank():
            return
        if self._file is None:
            _mend_last_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __del__(self) -> None:
        # Nothing is lost with an open file, because lines are flushed: no warning about it.
        if getattr(self, "_file", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None}


class TeeLog:
    """Hands decisions and metrics to several sinks, in the order given.

    Args:
        sinks: functions that take a :class:`Decision`, such as :class:`JsonLinesLog`.

    Raises:
        TypeError: one of them cannot be called.
    """

    def __init__(self, *sinks: LogSink) -> None:
        for i, sink in enumerate(sinks):
            if not callable(sink):
                raise TypeError(f"sinks[{i}]: expected a function of a Decision, got {sink!r}")
        self.sinks = sinks

    def __call__(self, decision: Decision) -> None:
        """Hand a decision on."""
        for sink in self.sinks:
            sink(decision)

    def metrics(self, step: int, **values: float) -> None:
        """Hand values of your own on to the sinks that take them."""
        for sink in self.sinks:
            take = getattr(sink, "metrics", None)
            if take is not None:
                take(step, **values)

    def close(self) -> None:
        """Close the sinks that can be closed."""
        for sink in self.sinks:
            close = getattr(sink, "close", None)
            if close is not None:
                close()


class LogReader:
    """Reads a log that may still be growing: :meth:`poll` takes what has come since.

    A resumed run starts at its checkpoint and writes some steps a second time; what an earlier line
    says of them is then replaced.

    Args:
        path: of the file, which need not exist yet.

    Attributes:
        readings: the readings so far, by step.
        metrics: the metrics so far.
        unfinished: the beginning of a line that is not there as a whole.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        self._start_over()

    def _start_over(self) -> None:
        self.readings: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []
        self.unfinished = b""
        self._at = 0  # bytes read
        self._lines = 0
        self._last: dict[frozenset[str], float] = {}  # step, by kind of record

    def poll(self) -> bool:
        """Read the lines that are new; whether there were any.

        A file that has become shorter is another run's, and is read from its beginning.

        Raises:
            ValueError: a line is not a record of :class:`JsonLinesLog`; the message names it.
            OSError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._at:
                    self._start_over()
                file.seek(self._at)
                new = file.read()
        except FileNotFoundError:
            if self._at:
                self._start_over()
            return False
        self._at += len(new)
        *whole, self.unfinished = (self.unfinished + new).split(b"\n")
        for line in whole:
            self._lines += 1
            self._take(line.decode("utf-8"))
        return bool(whole)

    def finish(self) -> None:
        """Take a last line that lacks only its end; pass over one that a killed run cut short."""
        line = self.unfinished.decode("utf-8")
        try:
            json.loads(line)
        except json.JSONDecodeError:
            return
        self._lines += 1
        self._take(line)
        self.unfinished = b""

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        where = f"{self.path}:{self._lines}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: expected a JSON object, got {line!r}") from error
        event = record.get("event") if isinstance(record, dict) else None
        if event not in ("reading", "metrics"):
            raise ValueError(f"{where}: expected a reading or metrics, got {line!r}")
        step = record.get("step")
        if not isinstance(step, (int, float)) or isinstance(step, bool):
            raise ValueError(f"{where}: expected a number as 'step', got {step!r}")
        records = self.readings if event == "reading" else self.metrics
        # Values that are logged apart may count different steps: only those of the same names are
        # compared. Two meters may report the same step.
        kind = _kind(record)
        if step < self._last.get(kind, -math.inf):
            records[:] = [r for r in records if r["step"] < step or _kind(r) != kind]
        records.append(record)
        self._last[kind] = step


def read_log(path: str | pathlib.Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Readings and metrics of a log, in the order they were written.

    A last line that a killed run left unfinished is passed over, and what a resumed run did a
    second time is there once.

    Raises:
        ValueError: a line is not a record of :class:`JsonLinesLog`; the message names it.
        OSError: the file cannot be read.
    """
    reader = LogReader(path)
    reader.path.stat()  # raises FileNotFoundError where poll() would wait for the file
    reader.poll()
    reader.finish()
    return reader.readings, reader.metrics


def of_epochs(readings: Iterable[Mapping[str, Any]]) -> bool:
    """Whether readings of a log are those of ``EpochAutoDrop``, one for each epoch."""
    return any("waited" in reading for reading in readings)


def _kind(record: Mapping[str, Any]) -> frozenset[str]:
    """Readings are one kind, whatever details they hold; metrics are told apart by their names."""
    return frozenset(["reading"] if record["event"] == "reading" else record)


def _mend_last_line(path: pathlib.Path) -> None:
    """End a line that lacks only its end; cut off one that a killed run left unfinished."""
    try:
        with path.open("rb+") as file:
            end = start = file.seek(0, 2)
            tail = b""
            while start > 0 and b"\n" not in tail:
                start = max(0, start - 4096)
                file.seek(start)
                tail = file.read(end - start)
            rest = tail.rpartition(b"\n")[2]
            if not rest:
                return
            if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
                raise ValueError(
                    f"{path}: expected a log to append to, got a file that ends in {rest[:60]!r}"
                )
            try:
                json.loads(rest)
            except ValueError:
                file.truncate(end - len(rest))
            else:
                file.seek(end)
                file.write(b"\n")
    except FileNotFoundError:
        return
