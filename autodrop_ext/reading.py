"""What the meter reports at the end of a window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

from . import checks
from .checks import Check, none_or
from .saved import Later, list_of, load

_UNSAVED = {"saved": False}  # too much for checkpoints


class PartReading(NamedTuple):
    """The angular velocity of one tensor or param group in one window.

    Attributes:
        angle: degrees; None if it is undefined (a zero or non-finite displacement).
        cosine: of the angle; None if it is undefined.
        norm: ``|s_i|`` over the part.
        previous_norm: ``|s_{i-1}|`` over the part.
        standard_error: of the angle, degrees; 0 if it is exact.
    """

    angle: float | None
    cosine: float | None
    norm: float
    previous_norm: float
    standard_error: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that fit a JSON line."""
        return {key: _plain(value) for key, value in self._asdict().items()}


UNDEFINED = PartReading(None, None, math.nan, math.nan, math.nan)
"""There is no angle."""


@dataclass(frozen=True)
class Reading:
    """The angular velocity of one window (UAI 2024, Definition 3.3).

    Attributes:
        step: optimizer steps observed so far, this window's last one included.
        window: index of the window, counted from 0.
        angle: between this window's displacement and the last one's, degrees in [0, 180]; None
            if it is undefined (a zero or non-finite displacement).
        cosine: of the angle; None if it is undefined.
        norm: ``|s_i|``, length of this window's displacement.
        previous_norm: ``|s_{i-1}|``.
        standard_error: of the angle, degrees: ``sin(angle) / sqrt(buckets)``, 0 if it is exact, NaN
            if it is undefined.
        per_tensor: the same of each parameter by name, if that was asked for. Histories keep the
            last 100 and checkpoints none of them.
        per_group: the same of each param group, if that was asked for.
    """

    step: int
    window: int
    angle: float | None
    cosine: float | None
    norm: float
    previous_norm: float
    standard_error: float = 0.0
    per_tensor: Mapping[str, PartReading] | None = field(default=None, metadata=_UNSAVED)
    per_group: tuple[PartReading, ...] | None = field(default=None, metadata=_UNSAVED)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that fit a JSON line: None in place of NaN and infinity.

        What was not asked for is left out: angles of tensors and groups, and a threshold.
        """
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {k: v for k, v in plain.items() if k not in _OPTIONAL or v not in (None, ())}


@dataclass(frozen=True)
class Decision(Reading):
    """A reading together with what a scheduler made of it.

    Attributes:
        step: optimizer steps so far, the warm-up's included.
        smoothed: the angular velocity behind the Gaussian filter, degrees; None if there are
            too few values since the last drop.
        rise: ``C_i - C_{i-1}``, degrees in one window; the rate drops if it stays below the
            threshold. None if there are not two smoothed values since the last drop.
        lr: learning rate of each param group after this step.
        dropped: whether this reading lowered a learning rate.
        dropped_groups: if every param group decides for itself, those whose rate was lowered.
        group_angles: likewise the angle of each group, degrees; None if undefined.
        group_smoothed: likewise its smoothed angle.
        group_rises: likewise its rise.
        threshold: what the rise was compared with, degrees per window; None if the scheduler
            has no such setting.
        warmup: how an automatic warm-up stands: "rising"; "reached" if the rates that were set have
            been, or "confined" if parameters travel no longer, which both end it; None after that
            and without one.
    """

    smoothed: float | None = None
    rise: float | None = None
    lr: tuple[float, ...] = ()
    dropped: bool = False
    dropped_groups: tuple[int, ...] = ()
    group_angles: tuple[float | None, ...] = ()
    group_smoothed: tuple[float | None, ...] = ()
    group_rises: tuple[float | None, ...] = ()
    threshold: float | None = None
    warmup: str | None = None


_OPTIONAL = (
    *("per_tensor", "per_group", "threshold", "warmup"),
    *("dropped_groups", "group_angles", "group_smoothed", "group_rises"),
)


def to_columns(records: Sequence[Any], kind: type) -> dict[str, list[Any]]:
    """Return a history as one list for each field of its dataclass; tuples become lists.

    Not a list of dicts: ``torch.distributed.checkpoint`` would take that apart into an entry for
    each value, which a shorter or empty history could not load.
    """
    saved = [f.name for f in fields(kind) if f.metadata.get("saved", True)]
    columns = {name: [getattr(r, name) for r in records] for name in saved}
    return {k: [list(x) if isinstance(x, tuple) else x for x in v] for k, v in columns.items()}


def from_columns(kind: type[Any]) -> Check:
    """Return the check of the columns of :func:`to_columns`, which returns their records.

    Columns that a checkpoint of an earlier version lacks keep their defaults.
    """
    form: dict[str, Check | Later] = {}
    for f in fields(kind):
        if f.metadata.get("saved", True):
            column = list_of(_check_of(str(f.type)))
            form[f.name] = column if f.default is MISSING else Later(column, None)

    def check(name: str, value: Any) -> list[Any]:
        columns = {
            key: column for key, column in load(value, form, name).items() if column is not None
        }
        length = len(next(iter(columns.values())))
        for key, column in columns.items():
            if len(column) != length:
                raise ValueError(f"{name}[{key!r}]: expected {length} values, got {len(column)}")
        rows = zip(*columns.values(), strict=True)
        records = [kind(**dict(zip(columns, row, strict=True))) for row in rows]
        for i, record in enumerate(records):
            lengths = [len(getattr(record, key, ())) for key in _ONE_A_GROUP]
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"{name}: expected equally many {', '.join(_ONE_A_GROUP)} in record {i}, got "
                    f"{lengths}"
                )
        return records

    return check


def _check_of(kind: str) -> Check:
    """Return the check of a record's field from its annotation."""
    if kind.endswith(" | None"):
        return none_or(_check_of(kind.removesuffix(" | None")))
    if kind.startswith("tuple"):
        items = list_of(_check_of(kind.removeprefix("tuple[").removesuffix(", ...]")))
        return lambda name, value: tuple(items(name, value))
    return {
        "bool": checks.flag,
        "int": checks.at_least(-1),
        "float": _check_float,
        "str": checks.text,
    }[kind]


def _check_float(name: str, value: Any) -> float:
    # NaN and infinity are values of norms and errors.
    return value if type(value) is float else checks.number(name, value, "a number", lambda x: True)


_ONE_A_GROUP = ("group_angles", "group_smoothed", "group_rises")

R = TypeVar("R", bound=Reading)

HISTORY = 10_000
"""Readings that a meter or scheduler keeps."""

PARTS_KEPT = 100
"""Readings whose parts stay in a history: 10,000 of a thousand tensors would take gigabytes."""


def remember(history: list[R], reading: R, bound: int) -> None:
    """Append to a history of at most ``bound`` readings, the last 100 of them with their parts."""
    history.append(reading)
    del history[:-bound]
    if len(history) > PARTS_KEPT:
        old = history[-PARTS_KEPT - 1]
        if old.per_tensor is not None or old.per_group is not None:
            history[-PARTS_KEPT - 1] = dataclasses.replace(old, per_tensor=None, per_group=None)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PartReading):
        return value.as_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value)
    return value
