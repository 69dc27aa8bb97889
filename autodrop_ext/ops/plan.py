"""Plan: which stretches of memory are read, and which buckets of a table they are added to.

A plan is made once for the tensors on a device. It holds no copy of them: kernels get the address
of each tensor at every use, and tables (``csrc/core/tables.h``) that say

* **hashed**: which stretch of which tensor goes to which row of the table, and how it is rotated
  and signed there (the count sketch of Charikar, Chen and Farach-Colton 2002);
* **exact**: which stretch goes to which buckets, one bucket an element.

A *chunk* is :data:`LANES` consecutive elements of one parameter in its global row-major order. Its
row, rotation and signs follow from a hash of the parameter's name and the chunk's number, so that
a shard adds what the whole parameter would have added there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..global_index import Runs

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Table = npt.NDArray[np.void]  # rows of PIECE or SPAN

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Dtypes that are read; the position of a dtype is its code in the tables."""

LANES = 4096
"""Buckets in a row of a hashed table, and elements in a chunk: 32 KiB of float64 stay in a
first-level cache or in the registers of a block of a GPU."""

SWAPS = 8
"""Elements in a packet; a packet is loaded as 16 or 32 bytes, and permuted in 8 ways."""

SPAN_ELEMENTS = 4096
"""Elements in a stretch of an exact plan: the work of a block of a GPU."""

PIECE = np.dtype(
    [
        ("offset", "<i8"),  # bytes from the tensor's address to the first element
        ("weight", "<f8"),
        ("hash", "<u4"),  # of the chunk, for signs
        ("tensor", "<u4"),
        ("start", "<u2"),  # first element within the chunk
        ("length", "<u2"),
        ("packet", "<u2"),  # rotation of packets
        ("swap", "u1"),  # exclusive or within a packet
        ("dtype", "u1"),
    ]
)
SPAN = np.dtype(
    [
        ("offset", "<i8"),
        ("weight", "<f8"),
        ("bucket", "<i8"),  # of the first element
        ("tensor", "<u4"),
        ("length", "<u2"),
        ("unused", "u1"),
        ("dtype", "u1"),
    ]
)
assert PIECE.itemsize == SPAN.itemsize == 32  # as csrc/core/tables.h has them


class Source(NamedTuple):
    """A tensor as a plan reads it.

    Attributes:
        name: identifies the parameter; equal on all ranks, and part of the hash.
        current: returns the tensor in the memory that it has now, complex elements as pairs.
        numel: elements that are read.
        dtype: of the elements, one of :data:`DTYPES`.
        weight: of its elements in the table.
        group: which of several tables it is added to.
        runs: where its elements stand in the whole parameter; None if they are all of it, in order.
        bucket: first bucket of the parameter in an exact table.
        staged: whether its elements are not dense in memory, so that they are copied at each read.
    """

    name: str
    current: Callable[[], Tensor]
    numel: int
    dtype: torch.dtype
    weight: float = 1.0
    group: int = 0
    runs: Runs | None = None
    bucket: int = 0
    staged: bool = False


class Plan:
    """The stretches of all tensors on one device.

    Args:
        sources: tensors on one device.
        buckets: buckets of each hashed table, a multiple of :data:`LANES`; None for exact tables.
        num_tables: hashed tables that stand one after the other.
        num_buckets: buckets of the exact table.

    Attributes:
        num_buckets: buckets of all tables together.
        num_rows: rows of all hashed tables together; 0 if the plan is exact.
        table: rows of :data:`PIECE` sorted by row and swap, or of :data:`SPAN` sorted by bucket.
        runs: of a hashed plan, int64 ``[num_rows * 8 + 1]``: pieces ``[runs[8 r + x], runs[8 r + x
            + 1])`` belong to row ``r`` and swap ``x``.
        weighted: whether some weight is not 1.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        device: torch.device,
        *,
        buckets: int | None,
        num_tables: int = 1,
        num_buckets: int = 0,
    ) -> None:
        self.sources = list(sources)
        self.device = device
        self.hashed = buckets is not None
        stretches = _stretches(self.sources, LANES if self.hashed else SPAN_ELEMENTS)
        if buckets is not None:
            self.num_buckets, self.num_rows = buckets * num_tables, buckets // LANES * num_tables
            self.table, self.runs = _pieces(self.sources, stretches, buckets // LANES, num_tables)
        else:
            self.num_buckets, self.num_rows = num_buckets, 0
            self.table, self.runs = _spans(self.sources, stretches), np.zeros(1, np.int64)
        self.weighted = any(source.weight != 1.0 for source in self.sources)


class _Stretches(NamedTuple):
    """Stretches that do not cross a multiple of a chunk's length in the global order."""

    tensor: IntArray
    local: IntArray
    first: IntArray
    length: IntArray


def _stretches(sources: Sequence[Source], step: int) -> _Stretches:
    whole = np.array([i for i, source in enumerate(sources) if source.runs is None], np.int64)
    numel = np.array([source.numel for source in sources], np.int64)[whole]
    columns = [(whole, np.zeros_like(whole), np.zeros_like(whole), numel)]
    for i, source in enumerate(sources):
        if source.runs is not None:
            columns.append((np.full(len(source.runs.length), i), *source.runs))
    joined = _Stretches(*(np.concatenate(column) for column in zip(*columns, strict=True)))
    order = np.argsort(joined.tensor, kind="stable")
    joined = _Stretches(*(column[order] for column in joined))
    joined = _Stretches(*(column[joined.length > 0] for column in joined))
    # Cut each run at the multiples of `step` in the global order.
    first, last = joined.first // step, (joined.first + joined.length - 1) // step
    counts = last - first + 1
    owner = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.maximum(joined.first[owner], (first[owner] + nth) * step)
    end = np.minimum(joined.first[owner] + joined.length[owner], (first[owner] + nth + 1) * step)
    at = joined.local[owner] + begin - joined.first[owner]
    return _Stretches(joined.tensor[owner], at, begin, end - begin)


def _described(sources: Sequence[Source], of: IntArray, local: IntArray, kind: np.dtype) -> Table:
    """Return rows of a table with what hashed and exact ones have in common."""
    table = np.zeros(len(of), kind)
    codes = np.array([DTYPES.index(source.dtype) for source in sources], np.uint8)
    sizes = np.array([source.dtype.itemsize for source in sources], np.int64)
    table["tensor"] = of
    table["offset"] = local * sizes[of]
    table["weight"] = np.array([source.weight for source in sources], np.float64)[of]
    table["dtype"] = codes[of]
    return table


def _pieces(
    sources: Sequence[Source], stretches: _Stretches, rows: int, num_tables: int
) -> tuple[Table, IntArray]:
    of = stretches.tensor
    keys = np.array([key_of(source.name) for source in sources], np.uint64)
    groups = np.array([source.group for source in sources], np.int64)
    table = _described(sources, of, stretches.local, PIECE)
    table["start"] = stretches.first % LANES
    table["length"] = stretches.length
    places = place(keys[of], stretches.first // LANES, rows)
    table["hash"], table["packet"], table["swap"] = places.hash, places.packet, places.swap
    row = places.row + groups[of] * rows
    bins = row * SWAPS + places.swap
    order = np.argsort(bins, kind="stable")
    counts = np.bincount(bins, minlength=rows * num_tables * SWAPS)
    return table[order], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _spans(sources: Sequence[Source], stretches: _Stretches) -> Table:
    table = _described(sources, stretches.tensor, stretches.local, SPAN)
    buckets = np.array([source.bucket for source in sources], np.int64)
    table["bucket"] = stretches.first + buckets[stretches.tensor]
    table["length"] = stretches.length
    return table[np.argsort(table["bucket"], kind="stable")]


class Place(NamedTuple):
    """Where chunks go; see :func:`place`."""

    row: IntArray
    packet: IntArray
    swap: IntArray
    hash: npt.NDArray[np.uint32]


def key_of(name: str) -> int:
    """Return 64 bits of a hash of a parameter's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def place(key: npt.NDArray[np.uint64], chunk: IntArray, rows: int) -> Place:
    """Return where chunks go in a table of so many rows.

    Args:
        key: :func:`key_of` of the parameter of each chunk, ``[n]``.
        chunk: number of the chunk within its parameter, ``[n]``.
        rows: rows of the table.
    """
    c = _mix64(key ^ _mix64(chunk.astype(np.uint64)))
    return Place(
        row=((c >> np.uint64(32)) % np.uint64(rows)).astype(np.int64),
        packet=(c >> np.uint64(3) & np.uint64(LANES // SWAPS - 1)).astype(np.int64),
        swap=(c & np.uint64(SWAPS - 1)).astype(np.int64),
        hash=(_mix64(c) >> np.uint64(32)).astype(np.uint32),
    )


def _mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits (splitmix64; arrays of uint64 wrap around without a warning)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
