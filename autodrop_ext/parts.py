"""Readings of single tensors and param groups: numbers that travel next to the totals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .angle import angle_of, movers, standard_error
from .ops.interface import Sums
from .ops.window_sums import COVARIANCES, WANDERING, WindowSums
from .reading import PartReading

_NUMBERS = 3 + COVARIANCES + WANDERING  # columns of WindowSums.tensor_table


class Parts:
    """Sums of every tensor, or of every param group, over all ranks.

    Args:
        names: name of every tensor that is summed on this rank.
        group_of: index of the param group of each of them.
        groups: how many param groups there are.
        per_tensor: whether every tensor is a part; otherwise every param group is.

    Attributes:
        size: how many numbers there are.
    """

    def __init__(
        self, names: Sequence[str], group_of: Sequence[int], groups: int, *, per_tensor: bool
    ) -> None:
        self._names = list(names) if per_tensor else []
        self._group_of = list(group_of)
        self._groups = groups
        # The part that each tensor belongs to, in the order of the devices' tables.
        self._part_of = list(range(len(names))) if per_tensor else self._group_of
        # A rank without elements must send as many numbers as the others.
        self._count = len(names) if per_tensor else groups
        self.size = _NUMBERS * self._count

    def local(self, sums: WindowSums) -> list[float]:
        """This rank's sums of each part after a close, weighted like the totals."""
        parts = np.zeros((self._count, _NUMBERS))
        tables = sums.tensor_table()
        if tables:
            np.add.at(parts, self._part_of, np.concatenate(tables))
        numbers: list[float] = parts.ravel().tolist()
        return numbers

    def fields(self, totals: Sums, numbers: Sequence[float]) -> dict[str, Any]:
        """``per_tensor``, if tensors are the parts, and ``per_group`` of a reading."""
        parts = np.array(numbers).reshape(-1, _NUMBERS)
        fields: dict[str, Any] = {}
        groups = parts
        if self._names:
            readings = map(_reading, parts.tolist())
            fields["per_tensor"] = dict(zip(self._names, readings, strict=True))
            groups = np.zeros((self._groups, _NUMBERS))
            np.add.at(groups, self._group_of, parts)
        fields["per_group"] = tuple(map(_reading, groups.tolist()))
        return fields

    def unknown(self) -> dict[str, Any]:
        """Return no fields, because such a reading has no parts."""
        return {}


def _reading(part: Sequence[float]) -> PartReading:
    dot, norm, previous_norm, *rest = part
    covariances, wandering = rest[:COVARIANCES], rest[COVARIANCES:]
    measured = angle_of(dot, norm, previous_norm)
    angle, cosine = (None, None) if measured is None else measured
    error = standard_error(dot, norm, previous_norm, covariances) if any(covariances) else 0.0
    unread = wandering[0]
    if movers(wandering) is None or (error == 0 and unread > 0):
        error = math.nan
    return PartReading(angle, cosine, norm**0.5, previous_norm**0.5, error)
