"""A run's log: JSON lines that grow while the run goes on."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any, TextIO

from .reading import Decision


class JsonLinesLog:
    """Appends one JSON object a line to a file; give it to ``AutoDrop`` as ``on_reading=``.

    Lines with ``"event": "reading"`` hold a :class:`Decision`; lines with ``"event": "metrics"``
    hold whatever :meth:`metrics` is given. Every line is flushed, so that a killed run keeps its
    log; a resumed run appends.

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
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None}


def read_log(path: str | pathlib.Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Readings and metrics of a log, in the order they were written.

    A last line that a killed run left unfinished is passed over.

    Raises:
        ValueError: a line is not a record of :class:`JsonLinesLog`; the message names it.
    """
    readings: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line!r}") from error
        event = record.get("event") if isinstance(record, dict) else None
        if event == "reading":
            readings.append(record)
        elif event == "metrics":
            metrics.append(record)
        else:
            raise ValueError(f"{path}:{number}: expected a reading or metrics, got {line!r}")
    return readings, metrics
