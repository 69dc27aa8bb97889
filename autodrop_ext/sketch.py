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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks
from .ops import Backend, select, table_device
from .ops.plan import FloatArray, IntArray, Plan, Source
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

    dot: FloatArray
    """``<s_i, s_{i-1}>``"""
    norm: FloatArray
    """``|s_i|^2``"""
    previous_norm: FloatArray
    """``|s_{i-1}|^2``"""


class _Bank:
    """The plan and the tables of one device."""

    def __init__(self, plan: Plan, members: IntArray, backend: Backend, *, whole: bool) -> None:
        self.plan = plan
        self.members = members
        self.backend = backend
        self._staged = [i for i, source in enumerate(plan.sources) if source.staged]
        self.accumulation = backend.bind(plan)
        self.tables = _zeros(3 if whole else 1, plan.num_buckets, table_device(plan.device))

    @property
    def running(self) -> Tensor:
        return self.tables[0]

    def add(self, bases: IntArray) -> None:
        if not self._staged:
            self.accumulation.accumulate(self.running, bases)
            return
        copies = [self.plan.sources[i].current().contiguous() for i in self._staged]
        bases = bases.copy()
        bases[self._staged] = [copy.data_ptr() for copy in copies]
        self.accumulation.accumulate(self.running, bases)  # the copies live until it has begun


def _zeros(number: int, buckets: int, device: torch.device) -> list[Tensor]:
    try:
        with torch.inference_mode(False):  # tables outlive the mode that they are made in
            return [torch.zeros(buckets, dtype=torch.float64, device=device) for _ in range(number)]
    except RuntimeError as error:
        # The CPU's allocator raises a plain RuntimeError.
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)):
            raise
        raise RuntimeError(
            f"no memory on {device}: {number * 8 * buckets:,} bytes were needed for {number} "
            f"tables of {buckets:,} float64 sums; buckets= sets their size, and with buckets=None "
            "there is one for each element"
        ) from error


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
        RuntimeError: a named backend does not serve a device; there is no memory.

    Attributes:
        buckets: buckets of a table; 0 if every element has its own.
        own: whether this rank keeps a table of its own elements.
        sharded: whether other ranks hold elements that this one does not.
        half_precision: dtype of most elements if that is one of 16 bits; None otherwise.
        weight: of all elements of the tables; the mean is ``running * weight / snapshots``.
        shards: the argument.
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
        elements = sum(s.tensor.numel() if s.total is None else s.total for s in shards)
        self.sharded = any(shard.split for shard in shards) or stage is not None
        self.own = buckets is None and self.sharded
        # The place of an element among all of the model must be known for a bucket of its own.
        placed = stage is None and not any(shard.flat for shard in shards)
        exact = buckets is None or (placed and elements <= buckets)
        self.buckets = 0 if exact else int(buckets or 0)
        if per_tensor and not exact:
            raise ValueError(
                "per_tensor: expected a meter in which every element has its own bucket, got "
                f"buckets={buckets} for {elements:,} elements; use buckets=None"
            )
        self._names = [shard.name for shard in shards]
        self._group_of = np.array([shard.group for shard in shards], np.int64)
        self._num_groups = num_groups
        self._per_tensor = per_tensor
        self._weights = np.array(weights if self.own else [], np.float64)
        uniform = len(set(weights)) <= 1
        self.weight = 1.0
        if not self.own and uniform and len(weights):
            self.weight, weights = float(weights[0]), [1.0] * len(shards)
        self._banks: list[_Bank] = []
        self._addresses: Sequence[int] = ()
        self._bases: list[IntArray] = []  # of each bank, at those addresses
        self._bounds: list[IntArray] = []
        self._members: list[IntArray] = []
        self._build(shards, [1.0] * len(shards) if self.own else weights, stage, backend)
        self.half_precision = _half_precision(shards)
        self._previous = np.zeros(self._num_parts())
        # Every rank's must be the same, so that one rank's state is good for all; in a pipeline no
        # rank knows the parameters of the other stages.
        described = [f"{s.name}|{s.identity}|{s.group}" for s in shards if stage is None]
        kind = f"{self.buckets} buckets, {num_groups} groups, {num_stages} stages"
        self.layout = hashlib.sha256("\n".join([kind, *described]).encode()).hexdigest()[:16]

    def _build(
        self,
        shards: Sequence[LocalShard],
        weights: Sequence[float],
        stage: int | None,
        backend: str,
    ) -> None:
        here = np.array([shard.tensor.numel() for shard in shards], np.int64)
        sizes = here if self.own else np.array([shard.total or 0 for shard in shards], np.int64)
        devices = list(dict.fromkeys(shard.tensor.device for shard in shards))
        places = np.zeros(len(shards), np.int64)
        if not self.own:
            places = np.cumsum(sizes) - sizes
        for device in devices or [torch.device("cpu")]:
            members = np.array([i for i, s in enumerate(shards) if s.tensor.device == device], int)
            bounds = np.concatenate([[0], np.cumsum(sizes[members if self.own else slice(None)])])
            if self.own:
                places[members] = bounds[:-1]
            rows = zip(
                members.tolist(), here[members].tolist(), places[members].tolist(), strict=True
            )
            sources = [
                Source(
                    name=_key(shard, stage),
                    current=shard.current,
                    numel=numel,
                    dtype=shard.tensor.dtype,
                    weight=weights[i],
                    group=shard.group if self._num_groups > 1 else 0,
                    runs=None if self.own else shard.runs,
                    bucket=place,
                    staged=shard.staged,
                )
                for i, numel, place in rows
                for shard in [shards[i]]
            ]
            plan = Plan(
                sources,
                device,
                buckets=self.buckets or None,
                num_tables=self._num_groups,
                num_buckets=int(bounds[-1]),
            )
            whole = self.own or not self._banks
            self._banks.append(_Bank(plan, members, select(backend, device), whole=whole))
            if self.buckets:
                bounds = np.arange(self._num_groups + 1) * self.buckets
            self._bounds.append(np.ascontiguousarray(bounds, np.int64))
            self._members.append(members if self.own else np.arange(len(shards)))

    # A window ------------------------------------------------------------------------------------

    def add(self, addresses: Sequence[int]) -> None:
        """Add the parameters as they are now to the running tables.

        Args:
            addresses: of the first element of each shard.
        """
        if addresses is not self._addresses:
            every = np.array(addresses, np.int64)
            self._bases = [every[bank.members] for bank in self._banks]
            self._addresses = addresses
        for bank, bases in zip(self._banks, self._bases, strict=True):
            bank.add(bases)

    def join(self) -> Tensor | None:
        """Return the running table of all devices, which ranks add up in place; None if own."""
        if self.own:
            return None
        first = self._banks[0].running
        for bank in self._banks[1:]:
            first += bank.running.to(first.device)
            bank.running.zero_()
        return first

    def checksum(self) -> float:
        """Return the squared norm of the running tables; NaN or infinity if they hold such."""
        return math.fsum(float(bank.running.dot(bank.running)) for bank in self._banks)

    def close(self, snapshots: int, weight: float) -> FloatArray:
        """End a window: the running sums become a mean and a displacement.

        Args:
            snapshots: that the running tables are the sum of.
            weight: of all elements in the running tables.

        Returns:
            ``<s_i, s_{i-1}>`` and ``|s_i|^2`` of each part, ``[num_parts, 2]``; those of this rank
            if ``own``.
        """
        whole = [bank for bank in self._banks if len(bank.tables) == 3]
        sums = np.zeros((len(self._names), 2)) if not self.buckets else np.zeros((0, 2))
        for bank, bounds, members in zip(whole, self._bounds, self._members, strict=False):
            running, mean, displacement = bank.tables
            divisor = snapshots / weight
            parts = bank.backend.close(running, mean, displacement, divisor, bounds)
            if self.buckets:
                return parts
            sums[members] = parts
        if self.own:
            sums *= self._weights[:, None]
        group = self._group_of if self._num_groups > 1 else np.zeros(len(sums), np.int64)
        of_groups = np.zeros((self._num_groups, 2))
        np.add.at(of_groups, group, sums)
        return np.concatenate([of_groups, sums]) if self._per_tensor else of_groups

    def totals(self, sums: FloatArray) -> Totals:
        """Return the sums of all ranks next to the norms of the window before."""
        previous, self._previous = self._previous, sums[:, 1].copy()
        return Totals(sums[:, 0], sums[:, 1], previous)

    def mean_norm(self) -> float:
        """Return the squared length of the last mean, estimated as that of its table."""
        mean = self._banks[0].tables[1]
        return float(mean.dot(mean))

    def rebase(self, addresses: Sequence[int], add_up: Callable[[Tensor], None]) -> None:
        """Make the parameters as they are now the mean that the next displacement starts from.

        Args:
            addresses: of the first element of each shard.
            add_up: adds a table up over the ranks, in place.
        """
        self.add(addresses)
        table = self.join()
        if table is not None and self.sharded:
            add_up(table)
        for bank in self._banks:
            if len(bank.tables) == 3:
                weight = self.weight if self.sharded and not self.own else 1.0
                torch.mul(bank.running, weight, out=bank.tables[1])
            bank.running.zero_()

    def _num_parts(self) -> int:
        return self._num_groups + (len(self._names) if self._per_tensor else 0)

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the order of their parts after those of the groups."""
        return self._names

    def merge(self) -> None:
        """Make the last two windows one of twice the length; it has no displacement."""
        for bank in self._banks:
            for _, mean, displacement in [bank.tables] if len(bank.tables) == 3 else []:
                mean.add_(displacement, alpha=-0.5)
                displacement.zero_()
        self._previous = np.zeros(self._num_parts())

    def start_over(self) -> None:
        """Forget everything that was added."""
        for bank in self._banks:
            for table in bank.tables:
                table.zero_()
        self._previous = np.zeros(self._num_parts())

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
        return [(s.name, s.current()) for bank in self._banks for s in bank.plan.sources]

    # State ---------------------------------------------------------------------------------------

    def state_dict(self, *, running: bool) -> dict[str, Any]:
        """Return the tables as CPU copies; none if other ranks hold the rest of them.

        The table of the open window is zero, and ``whole`` False, if it is not wanted or if other
        ranks have added to theirs. Its place is kept because ``torch.distributed.checkpoint`` loads
        only what a state has a place for.

        Args:
            running: whether the open window's table is wanted.
        """
        whole = running and not self.sharded
        state = {"layout": self.layout, "norms": self._previous.tolist(), "whole": whole}
        if self.own:
            return {**state, **dict.fromkeys(TABLES)}
        tables = [table.to("cpu", copy=True) for table in self._banks[0].tables]
        for bank in self._banks[1:]:
            tables[0] += bank.running.cpu()
        if not whole:
            tables[0].zero_()
        return {**state, **dict(zip(TABLES, tables, strict=True))}

    def problem_of(self, state: Mapping[str, Any]) -> str | None:
        """Return why saved tables cannot be continued, or None."""
        if state["mean"] is None:
            return "it has no tables: parameters had changed, or each rank has its own"
        if state["layout"] != self.layout:
            return "it was saved for other parameters, or with other buckets"
        sizes = {table.numel() for table in map(state.get, TABLES) if table is not None}
        if sizes != {self._banks[0].plan.num_buckets} or len(state["norms"]) != self._num_parts():
            return "its tables have another size"
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue saved tables that :meth:`problem_of` has no objection to."""
        self.start_over()
        for name, table in zip(TABLES, self._banks[0].tables, strict=True):
            if state[name] is not None:
                table.copy_(state[name])
        self._previous = np.array(state["norms"], np.float64)


def _table(name: str, value: Any) -> Any:
    if value is None:
        return None
    good = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not good or value.dtype != torch.float64 or value.ndim != 1:
        raise ValueError(f"{name}: expected None or a dense float64 vector, got {value!r}")
    return value


def _finite_table(name: str, value: Any) -> Any:
    if _table(name, value) is not None and not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return value


TABLES_FORM: Form = {
    "layout": checks.text,
    "norms": list_of(checks.at_least_zero),
    "whole": checks.flag,
    "running": _table,  # the open window may have met NaN
    "mean": _finite_table,
    "displacement": _finite_table,
}
"""Form of the tables in a saved state."""

NO_TABLES: Mapping[str, Any] = {
    "layout": "",
    "norms": [],
    "whole": False,
    "running": None,
    "mean": None,
    "displacement": None,
}
"""What a state has in place of tables."""

TABLES = ("running", "mean", "displacement")
"""Names of the tables in a state."""


def _key(shard: LocalShard, stage: int | None) -> str:
    """Return what an element's bucket follows from, next to its index."""
    name = shard.name if stage is None else f"stage {stage}: {shard.name}"
    return f"{name} on {shard.part}" if shard.flat else name


def _half_precision(shards: Sequence[LocalShard]) -> torch.dtype | None:
    elements: dict[torch.dtype, int] = {}
    for shard in shards:
        dtype = shard.tensor.dtype
        elements[dtype] = elements.get(dtype, 0) + shard.tensor.numel()
    most = max(elements, key=elements.__getitem__, default=torch.float32)
    return most if most in (torch.float16, torch.bfloat16) else None
