"""Sketch: the tables of three windows, from which the angle between two displacements follows.

A table is a count sketch (Charikar, Chen and Farach-Colton 2002) of the parameters: every element
is added, with a sign, to one of ``buckets`` float64 sums. Tables are linear in the parameters, so
that the table of a mean is the mean of tables, and the tables of all ranks add up to that of the
model. Dot products and norms of displacements are those of their tables, up to an error that is
known in advance; see :func:`standard_error`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks
from .ops import Backend, select, table_device
from .ops.plan import FloatArray, IntArray, Plan, Source
from .reading import PartReading
from .saved import Form, list_of
from .sharding import LocalShard


def standard_error(angle: float, buckets: int) -> float:
    """Return the standard error of an angle that was measured with so many buckets, degrees.

    It is ``sin(angle) / sqrt(buckets)`` in radians, in the mean over hashes. With the one hash that
    there is, errors are larger or smaller if few elements carry the motion; see
    ``docs/scaling.md``.

    Args:
        angle: degrees.
        buckets: of a table; 0 if every element has its own, so that the angle is exact.
    """
    if not buckets:
        return 0.0
    return math.degrees(math.sin(math.radians(angle)) / math.sqrt(buckets))


def angle_of(dot: float, norm: float, previous_norm: float) -> tuple[float | None, float | None]:
    """Return angle in degrees and cosine from ``<s, s'>``, ``|s|^2`` and ``|s'|^2``.

    There is none of the papers' epsilon, which would pull short displacements to 90 degrees. Both
    are None if a norm is zero or anything is not finite.
    """
    if not (math.isfinite(dot) and 0 < norm < math.inf and 0 < previous_norm < math.inf):
        return None, None
    cosine = max(-1.0, min(1.0, dot / (math.sqrt(norm) * math.sqrt(previous_norm))))
    return math.degrees(math.acos(cosine)), cosine


class Totals(NamedTuple):
    """Sums over parts of the model at a window's end, each float64 ``[num_parts]``."""

    dot: FloatArray  # <s_i, s_{i-1}>
    norm: FloatArray  # |s_i|^2
    previous_norm: FloatArray  # |s_{i-1}|^2


class _Bank:
    """The plan and the tables of one device: the running one, and on the first device the rest."""

    def __init__(self, plan: Plan, members: list[int], backend: Backend, num_tables: int) -> None:
        self.plan = plan
        self.backend = backend
        self._members = np.array(members, np.int64)
        self._staged = [i for i, source in enumerate(plan.sources) if source.staged]
        self._accumulation = backend.bind(plan)
        with torch.inference_mode(False):  # tables outlive the mode that they are made in
            self.tables = [
                torch.zeros(plan.num_buckets, dtype=torch.float64, device=table_device(plan.device))
                for _ in range(num_tables)
            ]

    @property
    def running(self) -> Tensor:
        return self.tables[0]

    def add(self, addresses: IntArray) -> None:
        bases = addresses if len(addresses) == len(self._members) else addresses[self._members]
        copies = [self.plan.sources[i].current().contiguous() for i in self._staged]
        if copies:
            bases = bases.copy()
            bases[self._staged] = [copy.data_ptr() for copy in copies]
        self._accumulation.accumulate(self.running, bases)  # the copies live until it has begun


class Sketch:
    """The tables of the open window, and mean and displacement of the last one.

    Every element has its own bucket, so that angles are exact, if the model has at most ``buckets``
    elements or ``buckets`` is None. With None, each rank of sharded parameters keeps the elements
    that it holds, and sums are added up in place of tables.

    Args:
        shards: what this rank holds of the parameters.
        weights: of the elements of each shard; all ranks together count every element once.
        buckets: buckets of a table, or None.
        num_groups: param groups, if each has a table of its own; 1 otherwise.
        per_tensor: whether sums of single tensors are wanted.
        stage: of a pipeline that the shards are of; None if they are those of the whole model.
        backend: "auto", or the name of a backend.
        num_stages: stages of the pipeline.

    Raises:
        ValueError: ``per_tensor`` needs exact sums.
        RuntimeError: a named backend does not serve a device.

    Attributes:
        shards: the argument.
        names: of the tensors, in the order of their parts after those of the groups.
        buckets: buckets of a table; 0 if every element has its own.
        own: whether this rank keeps a table of its own elements.
        sharded: whether other ranks hold elements that this one does not.
        half_precision: dtype of most elements if that is one of 16 bits; None otherwise.
        layout: digest of what the tables are tables of; equal on all ranks, and whatever the
            sharding unless ``own``.
    """

    def __init__(
        self,
        shards: Sequence[LocalShard],
        weights: Sequence[float],
        *,
        buckets: int | None,
        num_groups: int,
        per_tensor: bool,
        stage: int | None,
        backend: str,
        num_stages: int = 1,
    ) -> None:
        self.shards = shards
        self.names = [shard.name for shard in shards]
        self.sharded = any(shard.split for shard in shards) or stage is not None
        self.own = buckets is None and self.sharded
        sizes = [s.tensor.numel() if self.own or s.total is None else s.total for s in shards]
        # The place of an element among all of the model must be known for a bucket of its own.
        placed = stage is None and not any(shard.flat for shard in shards)
        exact = buckets is None or (placed and sum(sizes) <= buckets)
        self.buckets = 0 if exact else int(buckets or 0)
        if per_tensor and not exact:
            raise ValueError(
                "per_tensor: expected a meter in which every element has its own bucket, got "
                f"buckets={buckets} for {sum(sizes):,} elements; use buckets=None"
            )
        self._num_groups = num_groups
        groups = [shard.group if num_groups > 1 else 0 for shard in shards]
        self._group_of = np.array(groups, np.int64)
        self._per_tensor = per_tensor
        self._num_parts = num_groups + (len(shards) if per_tensor else 0)
        self._previous = np.zeros(self._num_parts)
        # Weights that are all the same are left to the window's end.
        same = not self.own and len(set(weights)) == 1
        self._weight = weights[0] if same else 1.0
        self._weights = np.array(weights if self.own else [], np.float64)
        ends = np.cumsum([0, *sizes], dtype=np.int64)
        self._bounds = ends  # of the parts of a table
        if self.buckets:
            self._bounds = self.buckets * np.arange(num_groups + 1, dtype=np.int64)
        self._banks: list[_Bank] = []
        devices = list(dict.fromkeys(shard.tensor.device for shard in shards))
        for device in devices or [torch.device("cpu")]:
            members = [i for i, shard in enumerate(shards) if shard.tensor.device == device]
            sources = [
                Source(
                    name=_key(shards[i], stage),
                    current=shards[i].current,
                    numel=shards[i].tensor.numel(),
                    dtype=shards[i].tensor.dtype,
                    weight=1.0 if self.own or same else weights[i],
                    group=groups[i],
                    runs=None if self.own else shards[i].runs,
                    bucket=int(ends[i]),
                    staged=shards[i].staged,
                )
                for i in members
            ]
            plan = Plan(
                sources,
                device,
                buckets=self.buckets or None,
                num_tables=num_groups,
                num_buckets=int(ends[-1]),
            )
            num_tables = 1 if self._banks else 3
            self._banks.append(_Bank(plan, members, select(backend, device), num_tables))
        self._tables = self._banks[0].tables  # running sum, mean and displacement
        self.half_precision = _half_precision(shards)
        # Every rank's must be the same, so that one rank's state is good for all; in a pipeline no
        # rank knows the parameters of the other stages.
        described = [f"{s.name}|{s.identity}|{s.group}" for s in shards if stage is None]
        kind = f"{self.buckets} buckets, {num_groups} groups, {num_stages} stages"
        self.layout = hashlib.sha256("\n".join([kind, *described]).encode()).hexdigest()[:16]

    # A window ------------------------------------------------------------------------------------

    def add(self, addresses: IntArray) -> None:
        """Add the parameters as they are now to the running tables.

        Args:
            addresses: of the first element of each shard, int64 ``[num_shards]``.
        """
        for bank in self._banks:
            bank.add(addresses)

    def is_finite(self) -> bool:
        """Return True if the running tables are finite, and so is everything added to them."""
        return all(math.isfinite(torch.linalg.vector_norm(bank.running)) for bank in self._banks)

    def join(self) -> Tensor:
        """Return the sum of the running tables of all devices; unless ``own``, ranks add it up."""
        for bank in self._banks[1:]:
            self._tables[0] += bank.running.to(self._tables[0].device)
            bank.running.zero_()
        return self._tables[0]

    def close(self, snapshots: int) -> FloatArray:
        """End a window: the joined table becomes a mean and a displacement.

        Args:
            snapshots: that the table is the sum of.

        Returns:
            ``<s_i, s_{i-1}>`` and ``|s_i|^2`` of each part, float64 ``[num_parts, 2]``; those of
            this rank if ``own``.
        """
        divisor = snapshots / self._weight
        running, mean, displacement = self._tables
        sums = self._banks[0].backend.close(running, mean, displacement, divisor, self._bounds)
        if self.buckets:
            return sums
        if self.own:
            sums *= self._weights[:, None]
        columns = [np.bincount(self._group_of, column, self._num_groups) for column in sums.T]
        of_groups: FloatArray = np.stack(columns, axis=1)
        return np.concatenate([of_groups, sums]) if self._per_tensor else of_groups

    def totals(self, sums: FloatArray) -> Totals:
        """Return the sums of all ranks next to the norms of the window before."""
        previous, self._previous = self._previous, sums[:, 1].copy()
        return Totals(sums[:, 0], sums[:, 1], previous)

    def angles(
        self, totals: Totals
    ) -> tuple[PartReading, tuple[PartReading, ...], dict[str, PartReading]]:
        """Return the angles of the model, of each group, and of each tensor that has sums."""
        groups = slice(self._num_groups)
        whole = self._angle(*(column[groups].sum() for column in totals))
        parts = [self._angle(*part) for part in zip(*totals, strict=True)]
        tensors = zip(self.names, parts[self._num_groups :], strict=False)
        return whole, tuple(parts[groups]), dict(tensors)

    def _angle(self, dot: float, norm: float, previous: float) -> PartReading:
        angle, cosine = angle_of(float(dot), float(norm), float(previous))
        error = math.nan if angle is None else standard_error(angle, self.buckets)
        return PartReading(angle, cosine, math.sqrt(norm), math.sqrt(previous), error)

    def mean_norm(self) -> float:
        """Return the squared length of the last mean, estimated as that of its table."""
        return float(torch.linalg.vector_norm(self._tables[1])) ** 2

    def rebase(self) -> None:
        """Let the joined table stand for the mean that the next displacement starts from."""
        weight = self._weight if self.sharded else 1.0  # replicas are not added up
        torch.mul(self._tables[0], weight, out=self._tables[1])
        self.discard_running()

    def merge(self) -> None:
        """Make the last two windows one of twice the length; it has no displacement."""
        _, mean, displacement = self._tables
        mean.add_(displacement, alpha=-0.5)
        displacement.zero_()
        self._previous = np.zeros(self._num_parts)

    def start_over(self) -> None:
        """Forget everything that was added."""
        self.discard_running()
        for table in self._tables:
            table.zero_()
        self._previous = np.zeros(self._num_parts)

    def discard_running(self) -> None:
        """Forget what was added in the open window."""
        for bank in self._banks:
            bank.running.zero_()

    # Looking -------------------------------------------------------------------------------------

    @property
    def device_bytes(self) -> int:
        """Bytes of tables and of what the kernels read next to the parameters, on all devices."""
        tables = sum(table.nbytes for bank in self._banks for table in bank.tables)
        return tables + sum(bank.plan.table.nbytes + bank.plan.runs.nbytes for bank in self._banks)

    @property
    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Names and tensors that are read."""
        return [(shard.name, shard.current()) for shard in self.shards]

    # State ---------------------------------------------------------------------------------------

    def state_dict(self, *, running: bool) -> dict[str, Any]:
        """Return the tables as CPU copies; none if other ranks hold the rest of them.

        The table of the open window is zero, and ``whole`` False, unless ``running`` is True and no
        other rank has added to its own. ``torch.distributed.checkpoint`` loads only what a state
        has a place for.
        """
        whole = running and not self.sharded
        state = {"layout": self.layout, "norms": self._previous.tolist(), "whole": whole}
        if self.own:
            return {**state, **dict.fromkeys(TABLES)}
        tables = [table.to("cpu", copy=True) for table in self._tables]
        for bank in self._banks[1:]:
            tables[0] += bank.running.cpu()
        if not whole:
            tables[0].zero_()
        return {**state, **dict(zip(TABLES, tables, strict=True))}

    def problem_of(self, state: Mapping[str, Any]) -> str | None:
        """Return why saved tables cannot be continued, or None."""
        if any(state[name] is None for name in TABLES):
            return "it has no tables: parameters had changed, or each rank has its own"
        if state["layout"] != self.layout:
            return "it was saved for other parameters, or with other buckets"
        sizes = {state[name].numel() for name in TABLES}
        if sizes != {self._tables[0].numel()} or len(state["norms"]) != self._num_parts:
            return "its tables have another size"
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue saved tables that :meth:`problem_of` has no objection to."""
        self.start_over()
        for name, table in zip(TABLES, self._tables, strict=True):
            table.copy_(state[name])
        self._previous = np.array(state["norms"], np.float64)


TABLES = ("running", "mean", "displacement")  # in a state
NO_TABLES: Mapping[str, Any] = {"layout": "", "norms": [], "whole": False, **dict.fromkeys(TABLES)}


def _table(name: str, value: Any) -> Any:
    if value is None:
        return None
    good = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not good or value.dtype != torch.float64 or value.ndim != 1:
        raise ValueError(f"{name}: expected None or a dense float64 vector, got {value!r}")
    return value


TABLES_FORM: Form = {
    "layout": checks.text,
    "norms": list_of(checks.at_least_zero),
    "whole": checks.flag,
    **dict.fromkeys(TABLES, _table),
}


def _key(shard: LocalShard, stage: int | None) -> str:
    """Return what an element's bucket follows from, next to its index."""
    name = shard.name if stage is None else f"stage {stage}: {shard.name}"
    return f"{name} on {shard.part}" if shard.flat else name


def _half_precision(shards: Sequence[LocalShard]) -> torch.dtype | None:
    elements: Counter[torch.dtype] = Counter()
    for shard in shards:
        elements[shard.tensor.dtype] += shard.tensor.numel()
    most = max(elements, key=elements.__getitem__, default=None)
    return most if most in (torch.float16, torch.bfloat16) else None
