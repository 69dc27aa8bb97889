"""A run's log, JSON lines that grow while the run goes on, and other places for decisions."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import torch

from .messages import Warnings
from .reading import Decision

_BEGINNING = b'{"event": "'
_BLOCK = 1 << 16  # bytes that are read at once while the beginning of the last line is looked for
_QUOTED = 80  # characters of a broken line in an error message
_LARGEST_STEP = 2**63  # A larger step is no count of optimizer steps.


class LogSink(Protocol):
    """Takes a run's decisions; any function that takes a :class:`Decision` will do.

    The sinks of this package also have ``metrics(step, **values)``, for other values such as a
    loss, and ``close()``. A sink that has ``begin(settings)`` is given the scheduler's settings
    before the first decision.
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
    """Appends one JSON object a line to a file; pass it to ``AutoDrop`` as ``on_reading=``.

    A line with ``"event": "settings"`` holds the scheduler's settings, which the scheduler passes
    to :meth:`begin`; lines with ``"event": "reading"`` hold a :class:`Decision`; lines with
    ``"event": "metrics"`` hold whatever :meth:`metrics` is given. Every line is written at once, so
    that a killed run keeps its log; a resumed run appends, after cutting off a line that was left
    unfinished. Of several ranks the first one writes.

    A disk that is full, or another trouble while the run goes on, does not end the training: there
    is one warning, lines are missing, and later ones are written as soon as that works again.

    Args:
        path: The file. It and its folder are created here, so that a path at which nothing can be
            written is noticed before the training starts.

    Raises:
        OSError: The file cannot be written.
        ValueError: The file exists and is not a log.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self._file: io.FileIO | None = None
        self._header: dict[str, Any] | None = None
        self._warnings = Warnings("JsonLinesLog")
        if is_first_rank():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab"):
                    _last_line(self.path)
            except OSError as error:
                raise type(error)(
                    f"path: expected a file that can be written, got {str(path)!r}: "
                    f"{error.strerror or error}"
                ) from error

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the header: the version of this package and the settings of a run.

        A scheduler calls this before its first decision, after it has loaded a checkpoint, and
        where a cooldown begins. A header that would only repeat the last one is left out.

        Args:
            settings: Plain values by name; ``scheduler`` is the name of its class.
        """
        from importlib.metadata import version  # needed here only

        header = {
            "event": "settings",
            "version": version("autodrop_ext"),
            "settings": _plain(settings),
        }
        if header != self._header:
            self._header = header
            self._write(header)

    def __call__(self, decision: Decision) -> None:
        """Write a decision."""
        self._write({"event": "reading", **decision.as_dict()})

    def metrics(self, step: int, **values: Any) -> None:
        """Write other values, such as ``loss``, at an optimizer step.

        Args:
            step: The optimizer step.
            **values: Numbers, also of numpy, or tensors of one element. NaN and infinity are
                written as null.

        Raises:
            TypeError: A value is not a number.
            ValueError: A value is called ``event``, which is the name of the kind of a line, or the
                step is not finite.
        """
        if "event" in values:
            raise ValueError("metrics: expected another name than 'event', which lines begin with")
        numbers = {name: _number(name, value) for name, value in {"step": step, **values}.items()}
        if numbers["step"] is None:
            raise ValueError(f"step: expected a finite number, got {step!r}")
        self._write({"event": "metrics", **numbers})

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: dict[str, Any]) -> None:
        if not is_first_rank():
            return
        line = json.dumps(record).encode() + b"\n"
        try:
            if self._file is None:
                _mend_last_line(self.path)
                # There is no buffer: after an error it would hold a line that close() fails on.
                self._file = self.path.open("ab", buffering=0)
            while line:
                line = line[self._file.write(line) :]
        except (OSError, ValueError) as error:
            # The next line opens the file again, and cuts off what is half there.
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError):  # the same trouble again
                    file.close()
            self._warnings.once(
                "unwritten",
                f"a line could not be written, and the run goes on without it: {self.path}: "
                f"{error}",
            )

    def __del__(self) -> None:
        # Nothing is lost with an open file, because nothing is buffered: no warning about it.
        if getattr(self, "_file", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        fresh = Warnings("JsonLinesLog")
        return {"path": self.path, "_file": None, "_header": None, "_warnings": fresh}


class TeeLog:
    """Hands settings, decisions and metrics to several sinks, one after the other.

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
        """Hand on a decision."""
        for sink in self.sinks:
            sink(decision)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Hand on a run's settings to the sinks that take them."""
        self._call("begin", settings)

    def metrics(self, step: int, **values: Any) -> None:
        """Hand on other values to the sinks that take them."""
        self._call("metrics", step, **values)

    def close(self) -> None:
        """Close the sinks that can be closed."""
        self._call("close")

    def _call(self, name: str, *args: Any, **values: Any) -> None:
        for sink in self.sinks:
            method = getattr(sink, name, None)
            if method is not None:
                method(*args, **values)


class LogReader:
    """Reads a log that may still be growing; :meth:`poll` takes the lines that are new.

    A resumed run starts at its checkpoint and writes some steps a second time, which replaces what
    earlier lines say about them.

    Args:
        path: The file, which need not exist yet.

    Attributes:
        settings: The newest settings of the run, and the ``version`` that wrote them. It is empty
            for logs of programs that passed none.
        readings: The readings so far, by step. Numbers that are not finite are None.
        metrics: The metrics so far.
        unfinished: The beginning of a line whose end has not been written yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self._start_over()

    def _start_over(self) -> None:
        self.settings: dict[str, Any] = {}
        self.readings: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []
        self.unfinished = b""
        self._at = 0  # bytes read
        self._lines = 0
        self._last: dict[frozenset[str], float] = {}  # step, by kind of record

    def poll(self) -> bool:
        """Read the lines that are new, and return whether there were any.

        A file that has become shorter is another run's, and is read from its beginning.

        Raises:
            ValueError: A line is not a record of :class:`JsonLinesLog`; the message names it.
            OSError: The file cannot be read.
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
        if b"\n" not in new:
            self.unfinished += new
            return False
        *whole, self.unfinished = (self.unfinished + new).split(b"\n")
        for line in whole:
            self._lines += 1
            self._take(line)
        return True

    def read_all(self) -> LogReader:
        """Read a log to its end.

        A last line that lacks only its end is taken, and one that a killed run cut short is not.

        Raises:
            ValueError: As for :meth:`poll`.
            OSError: The file is not there or cannot be read.
        """
        self.path.stat()  # raises FileNotFoundError, where poll() would wait for the file
        self.poll()
        if _is_json(self.unfinished) or not _may_be_record(self.unfinished):
            self._lines += 1
            self._take(self.unfinished)
            self.unfinished = b""
        return self

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        where = f"{self.path}:{self._lines}"
        quoted = line[:_QUOTED].decode("utf-8", "replace") + (" ..." if len(line) > _QUOTED else "")
        try:
            record = _DECODER.decode(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object, got {quoted!r}") from error
        event = record.get("event") if isinstance(record, dict) else None
        if event == "settings" and isinstance(record.get("settings"), dict):
            self.settings = {"version": record.get("version"), **record["settings"]}
            return
        if event not in ("reading", "metrics"):
            raise ValueError(f"{where}: expected a reading or metrics, got {quoted!r}")
        step = record.get("step")
        if (
            not isinstance(step, (int, float))
            or isinstance(step, bool)
            or not abs(step) < _LARGEST_STEP
        ):
            raise ValueError(f"{where}: expected a number as 'step', got {reprlib.repr(step)}")
        records = self.readings if event == "reading" else self.metrics
        # Values that are logged apart may count different steps: only those of the same names are
        # compared. Two meters may report the same step.
        kind = _kind(record)
        if step < self._last.get(kind, -math.inf):
            records[:] = [r for r in records if r["step"] < step or _kind(r) != kind]
        records.append(record)
        self._last[kind] = step


def read_log(
    path: str | os.PathLike[str],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the readings and the metrics of a log, in the order they were written.

    A last line that a killed run left unfinished is passed over, and what a resumed run did a
    second time is there once.

    Raises:
        ValueError: A line is not a record of :class:`JsonLinesLog`; the message names it.
        OSError: The file cannot be read.
    """
    reader = LogReader(path).read_all()
    return reader.readings, reader.metrics


def kind_of(readings: Iterable[Mapping[str, Any]]) -> Literal["windows", "epochs", "anytime"]:
    """Return what the readings of a log are about.

    ``EpochAutoDrop`` has one for each epoch, ``AnytimeAutoDrop`` one for each of its growing
    windows, and the others one for each window.
    """
    names = {name for reading in readings for name in reading}
    return "epochs" if "waited" in names else "anytime" if "power" in names else "windows"


def _kind(record: Mapping[str, Any]) -> frozenset[str]:
    """Readings are one kind, whatever details they hold; metrics differ by their names."""
    return frozenset(["reading"] if record["event"] == "reading" else record)


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=lambda name: None)


def _may_be_record(beginning: bytes) -> bool:
    return beginning.startswith(_BEGINNING) or _BEGINNING.startswith(beginning)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _number(name: str, value: Any) -> float | int | None:
    """A Python number for one of numpy, torch or Python; None if it is not finite."""
    try:
        number = value.item() if hasattr(value, "item") else value
        finite = math.isfinite(number)
    except OverflowError:  # an integer that no float can hold
        return None
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a number, got {value!r}") from error
    if not finite:
        return None
    return number if isinstance(number, (bool, int)) else float(number)


def _plain(value: Any) -> Any:
    """A copy that fits a JSON line."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _number("settings", value)


def _last_line(path: pathlib.Path) -> bytes:
    """The last line of a log if it lacks its end, and nothing otherwise.

    Raises:
        ValueError: The file is not a log.
    """
    blocks: list[bytes] = []
    with path.open("rb") as file:
        first = file.read(len(_BEGINNING))
        start = file.seek(0, 2)
        while start > 0 and not (blocks and b"\n" in blocks[-1]):
            length = min(_BLOCK, start)
            start -= length
            file.seek(start)
            blocks.append(file.read(length))
    rest = b"".join(reversed(blocks)).rpartition(b"\n")[2]
    for part, where in ((rest, "ends in"), (first, "begins with")):
        if not _may_be_record(part):
            raise ValueError(
                f"{path}: expected a log to append to, got a file that {where} {part[:60]!r}"
            )
    return rest


def _mend_last_line(path: pathlib.Path) -> None:
    """End a line that lacks only its end; cut off one that a killed run left unfinished."""
    if not path.exists():
        return
    rest = _last_line(path)
    if rest:
        with path.open("rb+") as file:
            end = file.seek(0, 2)
            if _is_json(rest):
                file.write(b"\n")
            else:
                file.truncate(end - len(rest))
