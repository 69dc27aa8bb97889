"""A run's log: JSON lines that grow while the run goes on."""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .messages import Warnings
from .reading import Decision

_BEGINNING = b'{"event": "'


def is_first_rank() -> bool:
    """Return True on the rank that writes logs, because all ranks come to the same decisions."""
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    return not started or distributed.get_rank() == 0


class JsonLinesLog:
    """Appends one JSON object a line to a file; pass it to a scheduler as ``on_reading=``.

    A line with ``"event": "settings"`` holds the scheduler's settings, which the scheduler passes
    to :meth:`begin`; lines with ``"event": "reading"`` hold a :class:`Decision`; lines with
    ``"event": "metrics"`` hold the values given to :meth:`metrics`. Every line is written at once,
    so that a killed run keeps its log, and a resumed run appends. Of several ranks the first one
    writes.

    A full disk, or another problem with the file during the run, does not end the training: there
    is one warning, lines are missing, and later ones are written as soon as that works again.

    Args:
        path: The file. It and its folder are created here, so that a path at which nothing can be
            written is noticed before the training starts.

    Raises:
        OSError: The file cannot be written.
        ValueError: The file exists and does not begin as a log does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self._header: dict[str, Any] | None = None
        self._warnings = Warnings("JsonLinesLog")
        if not is_first_rank():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                file.seek(0)
                beginning = file.read(len(_BEGINNING))
        except OSError as error:
            raise type(error)(
                f"path: expected a file that can be written, got {str(path)!r}: "
                f"{error.strerror or error}"
            ) from error
        if not _BEGINNING.startswith(beginning):
            raise ValueError(f"path: expected a log, got a file that begins with {beginning!r}")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the header: the version of this package and the settings of a run.

        A scheduler calls this before its first decision, after it has loaded a checkpoint, and
        when a cooldown begins. A header that would only repeat the last one is left out.

        Args:
            settings: Numbers, strings, lists and dicts by name; ``scheduler`` is the name of its
                class. NaN and infinity are written as null.
        """
        from importlib.metadata import version  # needed here only

        encoded = json.dumps(dict(settings), default=lambda value: _number("settings", value))
        header = {"version": version("autodrop_ext"), "settings": _DECODER.decode(encoded)}
        if header != self._header:
            self._header = header
            self._write("settings", header)

    def __call__(self, decision: Decision) -> None:
        """Write a decision."""
        self._write("reading", decision.as_dict())

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
        self._write("metrics", numbers)

    def _write(self, event: str, record: dict[str, Any]) -> None:
        if not is_first_rank():
            return
        line = json.dumps({"event": event, **record}).encode() + b"\n"
        try:
            # Opened for each line (tens of microseconds): nothing is left to close or to pickle.
            # There is no buffer: after an error it would hold a line that closing fails on.
            with self.path.open("ab+", buffering=0) as file:
                if file.seek(0, io.SEEK_END):
                    file.seek(-1, io.SEEK_END)
                    if file.read(1) != b"\n":  # The run was killed, or the disk was full.
                        line = b"\n" + line
                while line:
                    line = line[file.write(line) :]
        except OSError as error:
            self._warnings.once(
                "unwritten",
                f"a line could not be written, and the run goes on without it: {self.path}: "
                f"{error}",
            )


class LoggedRun(NamedTuple):
    """A log as :func:`read_log` reads it.

    Attributes:
        readings: The readings, in the order of their steps. Numbers that are not finite are None.
        metrics: The metrics, likewise.
        settings: The newest settings of the run, and the ``version`` that wrote them; empty if a
            program wrote none.
    """

    readings: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    settings: dict[str, Any]


def read_log(path: str | os.PathLike[str]) -> LoggedRun:
    """Return what a log holds, which may still be growing.

    A line that is not JSON, such as a killed run or a full disk leaves, is skipped. A resumed run
    starts at its checkpoint and writes some steps a second time, which replaces the earlier ones.

    Raises:
        ValueError: A line is JSON but not a record of :class:`JsonLinesLog`; the message names it.
        OSError: The file cannot be read.
    """
    run = LoggedRun([], [], {})
    newest: dict[frozenset[str], float] = {}  # step, by kind of record
    for i, line in enumerate(pathlib.Path(path).read_bytes().split(b"\n"), start=1):
        try:
            record = _DECODER.decode(line.decode())
        except (ValueError, RecursionError):
            continue
        event = record.get("event") if isinstance(record, dict) else None
        if event == "settings" and isinstance(record.get("settings"), dict):
            run.settings.clear()
            run.settings.update({"version": record.get("version"), **record["settings"]})
            continue
        if event not in ("reading", "metrics"):
            got = reprlib.repr(record)
            raise ValueError(f"{path}:{i}: expected a reading or metrics, got {got}")
        step = record.get("step")
        if not isinstance(step, (int, float)):
            raise ValueError(f"{path}:{i}: expected a number as 'step', got {reprlib.repr(step)}")
        records = run.readings if event == "reading" else run.metrics
        # Metrics of other names may count other steps, such as epochs, and replace only each
        # other. Two meters may report the same step.
        kind = _kind(record)
        if step < newest.get(kind, -math.inf):
            records[:] = [r for r in records if r["step"] < step or _kind(r) != kind]
        records.append(record)
        newest[kind] = step
    return run


def _kind(record: Mapping[str, Any]) -> frozenset[str]:
    """Return one kind for all readings, and the names of the values for metrics."""
    return frozenset(["reading"] if record["event"] == "reading" else record)


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=lambda name: None)


def _number(name: str, value: Any) -> float | int | None:
    """Return a Python number for one of numpy, torch or Python, or None if it is not finite."""
    try:
        number = value.item() if hasattr(value, "item") else value
        if not math.isfinite(number):
            return None
    except OverflowError:  # an integer that no float can hold
        return None
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a number, got {value!r}") from error
    return number if isinstance(number, (bool, int)) else float(number)
