"""What the meter reports at the end of a window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Reading:
    """The angular velocity of one window (UAI 2024, Definition 3.3).

    Attributes:
        step: optimizer steps observed so far, this window's last one included.
        window: index of the window, counted from 0.
        angle: between this window's displacement and the last one's, degrees in [0, 180]; None
            where it is undefined (a zero or non-finite displacement).
        cosine: of the angle; None where it is undefined.
        norm: ``|s_i|``, length of this window's displacement.
        previous_norm: ``|s_{i-1}|``.
        standard_error: of a sampled angle, degrees; 0 where every element was read.
        rounding_error: bound on what float32 sums may have moved the angle by, degrees.
    """

    step: int
    window: int
    angle: float | None
    cosine: float | None
    norm: float
    previous_norm: float
    standard_error: float = 0.0
    rounding_error: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values that fit a JSON line: None in place of NaN and infinity."""
        plain = dataclasses.asdict(self)
        for key, value in plain.items():
            if isinstance(value, float) and not math.isfinite(value):
                plain[key] = None
        return plain


@dataclass(frozen=True)
class Decision(Reading):
    """A reading together with what a scheduler made of it.

    Attributes:
        smoothed: the angular velocity behind the Gaussian filter, degrees; None where there are
            too few values since the last drop.
        rise: ``C_i - C_{i-1}``, degrees in one window; the rate drops where it stays below the
            threshold. None where there are not two smoothed values since the last drop.
        lr: learning rate of each param group after this step.
        dropped: whether this reading lowered a learning rate.
    """

    smoothed: float | None = None
    rise: float | None = None
    lr: tuple[float, ...] = ()
    dropped: bool = False


def to_columns(records: Sequence[Any], kind: type) -> dict[str, list[Any]]:
    """A history as one list for each field of its dataclass ``kind``; tuples become lists.

    Not a list of dicts: ``torch.distributed.checkpoint`` would take that apart into an entry for
    each value, which a shorter or empty history could not load.
    """
    columns = {field.name: [getattr(r, field.name) for r in records] for field in fields(kind)}
    return {k: [list(x) if isinstance(x, tuple) else x for x in v] for k, v in columns.items()}


def from_columns(columns: Mapping[str, Sequence[Any]], kind: type[Any]) -> list[Any]:
    """The records of :func:`to_columns`."""
    rows = zip(*columns.values(), strict=True)
    plain = ((tuple(x) if isinstance(x, list) else x for x in row) for row in rows)
    return [kind(**dict(zip(columns, row, strict=True))) for row in plain]


def angle_of(dot: float, norm: float, previous_norm: float) -> tuple[float, float] | None:
    """Angle in degrees and cosine from ``<s, s'>``, ``|s|^2`` and ``|s'|^2``.

    Computed without the papers' epsilon, which would pull short displacements to 90 degrees.
    None where a norm is zero or anything is not finite.
    """
    if not (math.isfinite(dot) and 0 < norm < math.inf and 0 < previous_norm < math.inf):
        return None
    cosine = max(-1.0, min(1.0, dot / (math.sqrt(norm) * math.sqrt(previous_norm))))
    return math.degrees(math.acos(cosine)), cosine
