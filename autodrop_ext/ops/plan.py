"""Plans: which elements are read, where they are in memory, and how they are cut into chunks.

A plan is made once per device. It flattens nothing: its tables hold addresses. Only the meter's own
state is flat, in *arenas*: float32 buffers in which every tensor has a segment that starts at a
multiple of 128 bytes. The tables (``csrc/core/tables.h``) are

* ``chunks``, int64 ``[num_chunks, 4]``: address of the first element, its offset in every arena,
  length in elements, dtype code. A chunk never crosses a tensor.
* ``tensor_chunks``, int64 ``[num_rows + 1]``: row ``t`` of the sums runs over the chunks from
  ``[t]`` up to ``[t + 1]``. A row is a tensor, without chunks if that is empty. Where a plan reads
  only ranges of the tensors, every range is a row.
* ``tiles``, int64 ``[num_tiles, 2]``: first chunk and number of chunks that a block of a GPU works
  on; only on devices other than the CPU.
* ``row_weights``, float64 ``[num_rows]``: weight of each row's sums in the total.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import reference
from .memory import Named, as_real, distinct, is_dense

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

CHUNK_ELEMENTS = 16_384
"""Elements per chunk: 64 KiB of float32 stay in a second-level cache, and the partial sums of a
chunk (64 bytes with its row of the table) weigh 0.03 % of the 12 bytes a parameter."""

GPU_CHUNK_ELEMENTS = 8_192
"""On a GPU a chunk is a block's work: 96 KiB to move at 256 threads. Small models still give every
multiprocessor several of them, and the first reads of a block weigh little."""

ALIGN_ELEMENTS = 32  # 128 bytes of float32

# Chunks of at most this many elements are a warp's work, and so many of them share a tile.
_SMALL_CHUNK = 1_024
_SMALL_CHUNKS_PER_TILE = 16


class Ranges(NamedTuple):
    """Stretches of the tensors that a plan reads instead of everything.

    Attributes:
        tensor: index among the plan's tensors, ``[num_ranges]``, ascending.
        start: first element within the tensor, ``[num_ranges]``.
        length: elements, ``[num_ranges]``.
        weight: of the range's sums in those of its tensor, float64 ``[num_ranges]``.
    """

    tensor: IntArray
    start: IntArray
    length: IntArray
    weight: FloatArray


@dataclass(frozen=True)
class Segment:
    """One tensor of a plan.

    Attributes:
        name: for messages.
        index: position of the tensor among those that the plan was made of.
        alias: the parameter's own memory, detached (complex: as real), so that it stays valid.
        flat: ``[n]``, the elements in memory order: a view of ``alias``, or a staging buffer.
        offset: position of its first element in every arena.
        elements: elements that it has there: ``n``, or those of its ranges, one range after the
            other, each of them aligned.
        partial: whether only ranges of the tensor are read.
        staged: whether ``flat`` is a copy that :meth:`Plan.refresh` renews, because the elements of
            ``alias`` are not dense in memory.
    """

    name: str
    index: int
    alias: Tensor
    flat: Tensor
    offset: int
    elements: int
    partial: bool
    staged: bool

    @property
    def shape(self) -> torch.Size:
        """Shape of :meth:`shaped`."""
        return torch.Size([self.elements]) if self.partial else self.alias.shape

    def in_arena(self, arena: Tensor) -> Tensor:
        """The segment of ``arena``, flat ``[elements]``."""
        return arena[self.offset : self.offset + self.elements]

    def shaped(self, arena: Tensor) -> Tensor:
        """The segment of ``arena`` in the parameter's shape (complex: with a last axis of 2).

        Where only ranges are read it stays flat.
        """
        if self.partial:
            return self.in_arena(arena)
        if self.staged:
            return self.in_arena(arena).view(self.alias.shape)
        return arena.as_strided(self.alias.shape, self.alias.stride(), self.offset)


class Plan:
    """The chunks of all tensors on one device.

    Args:
        named: names and tensors, all on ``device``; identical views count once.
        device: where the tables go.
        weights: weight of each tensor's sums in the total; None for 1 each.
        chunk_elements: elements per chunk, a multiple of 32; by default what suits the device.
        ranges: what is read instead of everything; the tensors must then be distinct.

    Raises:
        ValueError: two tensors overlap in memory without being the same; the message names both.
    """

    def __init__(
        self,
        named: Sequence[Named],
        device: torch.device,
        weights: Sequence[float] | None = None,
        *,
        chunk_elements: int | None = None,
        ranges: Ranges | None = None,
    ) -> None:
        self.device = device
        self.ranges = ranges
        named = [(name, as_real(tensor)) for name, tensor in named]
        kept = distinct(named) if ranges is None else range(len(named))
        self.segments = _segments(named, kept, ranges)
        of_tensor = np.array([1.0 if weights is None else weights[s.index] for s in self.segments])
        self.tensor_weights: FloatArray = of_tensor
        """Weight of each segment's sums in the total, float64 ``[num_segments]``."""
        lengths = np.array([s.flat.numel() for s in self.segments], np.int64)
        self.tensor_elements: FloatArray = np.maximum(lengths, 1).astype(np.float64)
        """Elements of each segment, at least 1, float64 ``[num_segments]``."""
        if ranges is None:
            size = CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
            tables = chunk_tables(
                addresses=[s.flat.data_ptr() for s in self.segments],
                lengths=lengths,
                dtypes=_dtype_codes(self.segments),
                chunk_elements=size if chunk_elements is None else chunk_elements,
            )
            of_row = of_tensor
        else:
            tables = _range_tables(self.segments, ranges)
            of_row = of_tensor[ranges.tensor] * ranges.weight
        self.arena_elements = tables.arena_elements
        self.num_elements = int(tables.chunks[:, 2].sum())
        self.num_chunks = len(tables.chunks)
        self.num_rows = len(tables.tensor_chunks) - 1
        self._host_chunks = tables.chunks
        self.chunks = torch.from_numpy(tables.chunks).to(device)
        if device.type != "cpu":
            self.tiles = torch.from_numpy(tile_table(tables.chunks[:, 2])).to(device)
        self.tensor_chunks = torch.from_numpy(tables.tensor_chunks).to(device)
        self.row_weights = torch.from_numpy(of_row.astype(np.float64)).to(device)
        self.half_precision = [
            t for t, s in enumerate(self.segments) if s.flat.dtype in reference.HALF_DTYPES
        ]
        """Indices of the segments in half precision."""
        self._staged = [s for s in self.segments if s.staged]

    def rows(self) -> Iterator[tuple[Tensor, slice]]:
        """For each row of the sums: its elements, flat, and their place in every arena."""
        if self.ranges is None:
            for s in self.segments:
                yield s.flat, slice(s.offset, s.offset + s.elements)
            return
        offsets, lengths = self._host_chunks[:, 1].tolist(), self._host_chunks[:, 2].tolist()
        places = (self.ranges.tensor.tolist(), self.ranges.start.tolist(), offsets, lengths)
        for t, start, offset, length in zip(*places, strict=True):
            yield self.segments[t].flat[start : start + length], slice(offset, offset + length)

    def per_tensor(self, rows: FloatArray) -> FloatArray:
        """Sums of each tensor from the sums of each row, ``[num_segments, columns]``.

        Args:
            rows: ``[num_rows, columns]``, unweighted.
        """
        if self.ranges is None:
            return rows
        expanded = rows * self.ranges.weight[:, None]
        count = len(self.segments)
        sums = [np.bincount(self.ranges.tensor, column, count) for column in expanded.T]
        return np.stack(sums, axis=1)

    def refresh(self) -> None:
        """Renew the copies of tensors that are not dense in memory. Call before accumulating."""
        for segment in self._staged:
            segment.flat.view(segment.alias.shape).copy_(segment.alias)

    def publish(self) -> None:
        """Carry the copies back to their tensors. Call after writing back."""
        for segment in self._staged:
            segment.alias.copy_(segment.flat.view(segment.alias.shape))


@dataclass(frozen=True)
class ChunkTables:
    """Host tables of a plan; see the module's text for the columns."""

    chunks: IntArray
    tensor_chunks: IntArray
    offsets: IntArray
    arena_elements: int


def chunk_tables(
    addresses: Iterable[int], lengths: Iterable[int], dtypes: Iterable[int], chunk_elements: int
) -> ChunkTables:
    """Cut tensors into chunks; pure arithmetic in int64.

    Args:
        addresses: address of the first element of each tensor, bytes.
        lengths: elements of each tensor, 0 allowed.
        dtypes: position of each tensor's dtype in :data:`reference.DTYPES`.
        chunk_elements: elements per chunk, a multiple of 32.
    """
    if chunk_elements <= 0 or chunk_elements % ALIGN_ELEMENTS:
        raise ValueError(
            f"chunk_elements: expected a positive multiple of {ALIGN_ELEMENTS}, "
            f"got {chunk_elements}"
        )
    length = np.fromiter(lengths, np.int64)
    address = np.fromiter(addresses, np.int64)
    dtype = np.fromiter(dtypes, np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(_aligned(length))])

    counts = -(-length // chunk_elements)
    tensor_chunks = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    owner = np.repeat(np.arange(len(length)), counts)
    start = (np.arange(len(owner)) - tensor_chunks[owner]) * chunk_elements
    itemsize = np.array([d.itemsize for d in reference.DTYPES], np.int64)[dtype]
    chunks = np.stack(
        [
            address[owner] + start * itemsize[owner],
            offsets[owner] + start,
            np.minimum(length[owner] - start, chunk_elements),
            dtype[owner],
        ],
        axis=1,
    )
    return ChunkTables(np.ascontiguousarray(chunks), tensor_chunks, offsets[:-1], int(offsets[-1]))


def tile_table(lengths: IntArray) -> IntArray:
    """Group chunks into tiles, int64 ``[num_tiles, 2]``, first chunk and number of chunks.

    A large chunk is alone, so that a block works on it; small neighbours come together.

    Args:
        lengths: elements of each chunk.
    """
    small = lengths <= _SMALL_CHUNK
    # Position within the run of small chunks that a chunk belongs to.
    index = np.arange(len(lengths))
    run_start = np.maximum.accumulate(np.where(small, 0, index + 1))
    starts_tile = ~small | ((index - run_start) % _SMALL_CHUNKS_PER_TILE == 0)
    first = np.flatnonzero(starts_tile)
    counts = np.diff(np.append(first, len(lengths)))
    return np.stack([first, counts], axis=1).astype(np.int64)


def _segments(named: Sequence[Named], kept: Iterable[int], ranges: Ranges | None) -> list[Segment]:
    read = None
    if ranges is not None:
        read = np.bincount(ranges.tensor, _aligned(ranges.length), len(named)).tolist()
    segments = []
    offset = 0
    for i in kept:
        name, alias = named[i]
        staged = alias.is_conj() or alias.is_neg() or not is_dense(alias)
        if staged:
            flat = torch.empty(alias.numel(), dtype=alias.dtype, device=alias.device)
        else:
            flat = alias.as_strided((alias.numel(),), (1,), alias.storage_offset())
        elements = flat.numel() if read is None else int(read[i])
        segments.append(Segment(name, i, alias, flat, offset, elements, ranges is not None, staged))
        offset += -(-elements // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
    return segments


def _range_tables(segments: Sequence[Segment], ranges: Ranges) -> ChunkTables:
    """Tables in which every range is a chunk and a row."""
    aligned = _aligned(ranges.length)
    ends = np.cumsum(aligned)
    address = np.array([s.flat.data_ptr() for s in segments], np.int64)[ranges.tensor]
    dtype = np.array(_dtype_codes(segments), np.int64)[ranges.tensor]
    itemsize = np.array([s.flat.element_size() for s in segments], np.int64)[ranges.tensor]
    chunks = np.stack(
        [address + ranges.start * itemsize, ends - aligned, ranges.length, dtype], axis=1
    )
    offsets = np.array([s.offset for s in segments], np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return ChunkTables(
        np.ascontiguousarray(chunks), np.arange(len(chunks) + 1, dtype=np.int64), offsets, total
    )


def _dtype_codes(segments: Sequence[Segment]) -> list[int]:
    codes = {dtype: code for code, dtype in enumerate(reference.DTYPES)}
    return [codes[s.flat.dtype] for s in segments]


def _aligned(lengths: IntArray) -> IntArray:
    aligned: IntArray = -(-lengths // ALIGN_ELEMENTS) * np.int64(ALIGN_ELEMENTS)
    return aligned
