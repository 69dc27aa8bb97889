"""What a window yields beside its totals: error terms, and the sums of tensors and param groups.

All of it is one list of numbers that ranks add up like the totals, in the same collective. Its
length follows from the settings and the names of the parameters, which the ranks compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .distributed import LocalShard
from .ops import Sums
from .ops.device_sums import Arenas
from .reading import PartReading, Reading, angle_of
from .sampling.auto import FRACTIONS, foreseen
from .sampling.draw import Choice
from .sampling.error import (
    MOMENTS,
    SQUARES,
    FloatArray,
    margin,
    scatter,
    squares,
    standard_error,
    variances,
)

_SUMS = 3  # dot, norm, previous norm
_TOTAL = 1 + MOMENTS + SQUARES  # numbers of the whole
_PART = _SUMS + MOMENTS  # numbers of a tensor or group


class Added(NamedTuple):
    """The numbers of all ranks together.

    Attributes:
        spread: sum over the elements that were read of the squares of what each stands for.
        moments: covariances of dot, norm and previous norm, six.
        squares: what the degrees of freedom are computed from, 21.
        foreseen: the same under each of ``FRACTIONS``; empty unless asked for.
        parts: of each tensor or group, dot, norm, previous norm and their covariances.
    """

    spread: float
    moments: list[float]
    squares: list[float]
    foreseen: list[list[float]]
    parts: list[list[float]]


class Details:
    """Gathers the numbers of one rank, and takes those of all apart.

    Args:
        arenas: of every device.
        shards: what lies there, those that are summed.
        groups: number of param groups.
        sampled: whether only a part is read.
        room: whether the list has room for error terms, and for those under other fractions.
            The same for all choices of a meter, so that ranks need not change at once.
        per_tensor: whether every tensor is a part.
        per_group: whether every param group is one, where tensors are not.
        foresee: whether the error under other fractions is wanted.
    """

    def __init__(
        self,
        arenas: Sequence[Arenas],
        shards: Sequence[Sequence[LocalShard]],
        groups: int,
        *,
        sampled: bool,
        room: tuple[bool, bool],
        per_tensor: bool,
        per_group: bool,
        foresee: bool,
    ) -> None:
        self._arenas = arenas
        self._foresee = foresee
        every = [shard for device in shards for shard in device]
        self._names = [shard.name for shard in every] if per_tensor else []
        self._group_of = [shard.group for shard in every]
        self._num_groups = groups if per_tensor or per_group else 0
        count = len(every) if per_tensor else self._num_groups
        # Which part each tensor of each device belongs to.
        numbers = iter(range(len(every)) if per_tensor else self._group_of)
        self._parts = [[next(numbers) for _ in device] for device in shards] if count else []
        self._num_parts = count
        self.sampled = sampled
        # A rank without elements must send as many numbers as the others.
        errors, ahead = room
        self._head = _TOTAL * errors + MOMENTS * len(FRACTIONS) * ahead
        self.size = self._head + _PART * self._num_parts

    @np.errstate(all="ignore")  # of numbers that are not finite, the meter speaks on all ranks
    def gather(self) -> list[float]:
        """This rank's numbers after a close, weighted like the totals."""
        if not self.size:
            return []
        spread = 0.0
        moments = np.zeros(MOMENTS)
        products = np.zeros(SQUARES)
        ahead = np.zeros((len(FRACTIONS), MOMENTS))
        parts = np.zeros((self._num_parts, _PART))
        for d, arenas in enumerate(self._arenas):
            plan = arenas.plan
            of_tensor = np.zeros((len(plan.segments), MOMENTS))
            if plan.choice is not None and plan.sample is not None:
                choice = plan.choice
                scattered = scatter(arenas.rows, choice)
                weights = plan.tensor_weights[choice.stratum_tensor]
                of_stratum = variances(scattered, choice.population, choice.taken)
                moments += weights @ of_stratum
                products += squares(of_stratum, choice.taken, weights)
                if self._foresee:
                    ahead += foreseen(scattered, choice, plan.sample.fraction, weights)
                if self._num_parts:
                    of_tensor = _by_tensor(of_stratum, choice, len(plan.segments))
                stands_for = choice.expansion**2 * choice.length
                spread += float(plan.tensor_weights[choice.tensor] @ stands_for)
            if self._num_parts:
                sums = arenas.per_tensor.cpu().numpy()[:, :_SUMS]
                numbers = np.concatenate([sums, of_tensor], axis=1)
                np.add.at(parts, self._parts[d], numbers * plan.tensor_weights[:, None])
        head = [spread, *moments.tolist(), *products.tolist(), *ahead.ravel().tolist()]
        return [*head[: self._head], *parts.ravel().tolist()]

    def added(self, numbers: Sequence[float]) -> Added:
        """What the numbers of all ranks together mean."""
        head, tail = list(numbers[: self._head]), list(numbers[self._head :])
        ahead = head[_TOTAL:] if self._foresee else []
        return Added(
            spread=head[0] if head else 0.0,
            moments=head[1 : 1 + MOMENTS],
            squares=head[1 + MOMENTS : _TOTAL],
            foreseen=[ahead[i : i + MOMENTS] for i in range(0, len(ahead), MOMENTS)],
            parts=[tail[i : i + _PART] for i in range(0, len(tail), _PART)],
        )

    def reading(
        self, step: int, window: int, sums: Sums, rounding_error: float, added: Added | None
    ) -> Reading:
        """What a window's totals and numbers come to.

        Args:
            step: of the window's end.
            window: its index.
            sums: totals over all ranks.
            rounding_error: of their angle, degrees.
            added: None where the ranks' numbers are not known.
        """
        measured = angle_of(sums.dot, sums.norm, sums.previous_norm)
        angle, cosine = (None, None) if measured is None else measured
        error = width = math.nan if self.sampled else 0.0
        if self.sampled and added is not None:
            error = standard_error(*sums[:3], added.moments)
            width = margin(*sums[:3], added.moments, added.squares)
        return Reading(
            step=step,
            window=window,
            angle=angle,
            cosine=cosine,
            norm=math.sqrt(sums.norm),
            previous_norm=math.sqrt(sums.previous_norm),
            standard_error=error,
            rounding_error=rounding_error,
            margin=width,
            per_tensor=None if added is None else self._per_tensor(added),
            per_group=None if added is None else self._per_group(added),
        )

    def _per_tensor(self, added: Added) -> dict[str, PartReading] | None:
        """Readings of each tensor by name, if they were asked for."""
        if not self._names:
            return None
        return dict(zip(self._names, map(_reading, added.parts), strict=True))

    def _per_group(self, added: Added) -> tuple[PartReading, ...] | None:
        """Readings of each param group, if they were asked for."""
        if not self._num_groups:
            return None
        parts = np.array(added.parts).reshape(-1, _PART)
        if self._names:
            groups = np.zeros((self._num_groups, _PART))
            np.add.at(groups, self._group_of, parts)
            parts = groups
        return tuple(_reading(part) for part in parts.tolist())


def _by_tensor(of_stratum: FloatArray, choice: Choice, tensors: int) -> FloatArray:
    columns = [np.bincount(choice.stratum_tensor, column, tensors) for column in of_stratum.T]
    return np.stack(columns, axis=1)


def _reading(part: Sequence[float]) -> PartReading:
    dot, norm, previous_norm = part[:_SUMS]
    measured = angle_of(dot, norm, previous_norm)
    angle, cosine = (None, None) if measured is None else measured
    moments = part[_SUMS:]
    error = standard_error(dot, norm, previous_norm, moments) if any(moments) else 0.0
    return PartReading(angle, cosine, norm**0.5, previous_norm**0.5, error)
