"""Backend: a way to run the operations on tables on some devices."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from . import native, reference
from .plan import SWAPS, FloatArray, IntArray, Plan

CLOSE_BLOCK = 4096
"""Buckets of a partial sum at a window's end; fixed, so that results depend on no grid."""


class Accumulation(Protocol):
    """The read of all tensors of one plan."""

    def accumulate(self, table: Tensor, bases: IntArray) -> None:
        """Add every tensor to a table.

        Args:
            table: float64 ``[plan.num_buckets]`` on the plan's device.
            bases: address of each tensor's first element now, ``[num_tensors]``.
        """


class Backend(Protocol):
    """A way to run the operations on some devices."""

    name: str

    def missing(self, device: torch.device) -> str | None:
        """Return why this backend does not serve a device, or None if it does."""

    def bind(self, plan: Plan) -> Accumulation:
        """Return the read of a plan; everything that can be prepared is prepared here."""

    def close(
        self, running: Tensor, mean: Tensor, displacement: Tensor, divisor: float, bounds: IntArray
    ) -> FloatArray:
        """End a window, as :func:`reference.close` does, for several parts of the tables.

        Args:
            running, mean, displacement: float64 ``[n]`` on one device.
            divisor: what makes a mean of ``running``.
            bounds: part ``i`` has the buckets from ``bounds[i]`` up to ``bounds[i + 1]``;
                ``[num_parts + 1]``, from 0 to ``n``.

        Returns:
            ``<s_i, s_{i-1}>`` and ``|s_i|^2`` of each part, ``[num_parts, 2]``.
        """


class ReferenceBackend:
    """The specification as a backend: any device, several calls of torch for each tensor."""

    name = "reference"

    def missing(self, device: torch.device) -> str | None:
        return None

    def bind(self, plan: Plan) -> ReferenceAccumulation:
        return ReferenceAccumulation(plan)

    def close(
        self, running: Tensor, mean: Tensor, displacement: Tensor, divisor: float, bounds: IntArray
    ) -> FloatArray:
        sums = [
            reference.close(running[a:b], mean[a:b], displacement[a:b], divisor)
            for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
        return np.array(sums, np.float64).reshape(-1, 2)


class ReferenceAccumulation:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        of = plan.table["tensor"]
        self._of_tensor = [np.flatnonzero(of == i) for i in range(len(plan.sources))]
        if plan.hashed:
            self._row = np.repeat(np.arange(plan.num_rows), np.diff(plan.runs[::SWAPS]))

    def accumulate(self, table: Tensor, bases: IntArray) -> None:
        for source, mine in zip(self._plan.sources, self._of_tensor, strict=True):
            x = in_memory_order(source.current(), staged=source.staged)
            if self._plan.hashed:
                rows = torch.from_numpy(self._row[mine])
                reference.accumulate(table, x, self._plan.table[mine], rows)
            else:
                reference.accumulate_exact(table, x, self._plan.table[mine])


def in_memory_order(tensor: Tensor, *, staged: bool) -> Tensor:
    """Return the elements flat in the order of memory, or of a dense copy if that is needed."""
    tensor = tensor.detach()
    if staged:
        tensor = tensor.contiguous()
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class CpuBackend:
    """The compiled kernels for CPUs: one call into ``csrc/cpu`` for each operation.

    Args:
        isa: an instruction set by name ("baseline", "avx2", "avx512") instead of the best one.
    """

    name = "cpu"

    def __init__(self, isa: str = "") -> None:
        self._isa = isa

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on cpu tensors, not on {device.type}"
        return native.why_missing() if native.core is None else None

    def bind(self, plan: Plan) -> CpuAccumulation:
        return CpuAccumulation(plan, self._isa)

    def close(
        self, running: Tensor, mean: Tensor, displacement: Tensor, divisor: float, bounds: IntArray
    ) -> FloatArray:
        sums = np.zeros((len(bounds) - 1, 2))
        native.loaded().close(
            running.data_ptr(),
            mean.data_ptr(),
            displacement.data_ptr(),
            divisor,
            bounds.ctypes.data,
            len(sums),
            sums.ctypes.data,
            torch.get_num_threads(),
        )
        return sums


class CpuAccumulation:
    def __init__(self, plan: Plan, isa: str) -> None:
        self._plan = plan
        self._isa = isa
        self._core = native.loaded()

    def accumulate(self, table: Tensor, bases: IntArray) -> None:
        plan = self._plan
        tables, threads = plan.table.ctypes.data, torch.get_num_threads()
        if plan.hashed:
            self._core.accumulate(
                tables,
                plan.runs.ctypes.data,
                plan.num_rows,
                bases.ctypes.data,
                table.data_ptr(),
                plan.weighted,
                threads,
                self._isa,
            )
        else:
            self._core.accumulate_exact(
                tables, len(plan.table), bases.ctypes.data, table.data_ptr(), threads, self._isa
            )


def close_blocks(bounds: IntArray) -> tuple[IntArray, IntArray]:
    """Cut the parts of a table into blocks of at most :data:`CLOSE_BLOCK` buckets.

    Returns:
        First bucket and the one after the last of each block, ``[num_blocks, 2]``; and the part of
        each block, ``[num_blocks]``.
    """
    lengths = np.diff(bounds)
    counts = -(-lengths // CLOSE_BLOCK)
    part = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = bounds[part] + nth * CLOSE_BLOCK
    end = np.minimum(begin + CLOSE_BLOCK, bounds[part + 1])
    return np.stack([begin, end], axis=1).astype(np.int64), part


def add_blocks(block_sums: FloatArray, part: IntArray, num_parts: int) -> FloatArray:
    """Add the sums of blocks, ``[num_blocks, 2]``, to those of parts in the order of the blocks."""
    columns = [np.bincount(part, column, num_parts) for column in block_sums.T]
    return np.stack(columns, axis=1) if columns else np.zeros((num_parts, 2))


def table_device(device: torch.device) -> torch.device:
    """Return where tables of tensors on a device are: there, unless it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
