"""Plans: which elements take part, where they lie, and how they are cut into chunks.

A plan is made once per device. It flattens nothing: its tables hold addresses. Only the meter's own
state is flat, in *arenas*: float32 buffers in which every tensor has a segment that starts at a
multiple of 128 bytes. The tables (``csrc/core/tables.h``) are

* ``chunks``, int64 ``[num_chunks, 4]``: address of the first element, its offset in every arena,
  length in elements, dtype code. A chunk never crosses a tensor.
* ``tensor_chunks``, int64 ``[num_rows + 1]``: row ``t`` of the sums runs over the chunks from
  ``[t]`` up to ``[t + 1]``. A row is a tensor, without chunks if that is empty; in a sampled plan
  it is a chunk, because chunks of one tensor then have weights and a scatter of their own.
* ``tiles``, int64 ``[num_tiles, 2]``: first chunk and number of chunks that a block of a GPU works
  on; only on devices other than the CPU.
* ``weights``, float64 ``[num_rows]``: weight of each row's sums in the total.

A sampled plan (:mod:`autodrop_ext.sampling.draw`) has chosen chunks only. Those of one tensor lie
in its segment one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..parameters import Named
from ..sampling.draw import Choice, FloatArray, Sample, choose, num_chunks
from . import reference

IntArray = npt.NDArray[np.int64]

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

# Above this many elements two interleaved strided views are not compared element by element.
_MAX_COMPARED_SPAN = 1 << 30


@dataclass(frozen=True)
class Segment:
    """One tensor of a plan.

    Attributes:
        name: for messages.
        index: of the tensor among those that the plan was made of.
        alias: the parameter's own memory, detached (complex: as real), so that it stays valid.
        flat: ``[n]``, the elements in memory order: a view of ``alias``, or a staging buffer.
        offset: of its first element in every arena.
        elements: that it has there: ``n``, or in a sampled plan those that are read, chunk after
            chunk, each of them aligned.
        sampled: whether the plan is.
        staged: ``flat`` is a copy that :meth:`Plan.refresh` renews, because the elements of
            ``alias`` do not lie densely in memory.
    """

    name: str
    index: int
    alias: Tensor
    flat: Tensor
    offset: int
    elements: int
    sampled: bool
    staged: bool

    @property
    def shape(self) -> torch.Size:
        """Of :meth:`shaped`."""
        return torch.Size([self.elements]) if self.sampled else self.alias.shape

    def in_arena(self, arena: Tensor) -> Tensor:
        """The segment of ``arena``, flat ``[elements]``."""
        return arena[self.offset : self.offset + self.elements]

    def shaped(self, arena: Tensor) -> Tensor:
        """The segment of ``arena`` in the parameter's shape (complex: with a last axis of 2).

        In a sampled plan, flat.
        """
        if self.sampled:
            return self.in_arena(arena)
        if self.staged:
            return self.in_arena(arena).view(self.alias.shape)
        return arena.as_strided(self.alias.shape, self.alias.stride(), self.offset)


class Plan:
    """The chunks of all tensors that lie on one device.

    Args:
        named: names and tensors, all on ``device``; identical views count once.
        device: where the tables go.
        weights: of each tensor's sums in the total; None for 1 each.
        chunk_elements: elements per chunk, a multiple of 32; by default what suits the device.
        sample: which part of the chunks is read; None for everything, in larger chunks.
        labels: of the tensors, that the sample's choice depends on; None for the names.
        sizes: by name of the tensor, how far each of its chunks moves; see
            :func:`~autodrop_ext.sampling.draw.choose`. Passed over where they are not those of the
            tensors.

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
        sample: Sample | None = None,
        labels: Sequence[str] | None = None,
        sizes: Mapping[str, FloatArray] | None = None,
    ) -> None:
        self.device = device
        self.sample = sample
        distinct = _distinct(named := [(name, _real(tensor)) for name, tensor in named])
        self.choice: Choice | None = None
        if sample is not None:
            lengths = [named[i][1].numel() for i in distinct]
            told = [named[i][0] if labels is None else labels[i] for i in distinct]
            of_tensor = [] if sizes is None else [sizes.get(named[i][0]) for i in distinct]
            fitting = [
                size
                for size, n in zip(of_tensor, lengths, strict=False)
                if size is not None and len(size) == num_chunks(n)
            ]
            fit = sizes is not None and len(fitting) == len(distinct)
            self.choice = choose(lengths, told, sample, fitting if fit else None)
        self.segments = _segments(named, distinct, self.choice)
        tensor_weights = np.array(
            [1.0 if weights is None else weights[s.index] for s in self.segments]
        )
        if self.choice is None:
            tables = chunk_tables(
                addresses=[s.flat.data_ptr() for s in self.segments],
                lengths=[s.flat.numel() for s in self.segments],
                dtypes=[reference.DTYPES.index(s.flat.dtype) for s in self.segments],
                chunk_elements=chunk_elements
                or (CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS),
            )
            of_row = tensor_weights
        else:
            tables = _sampled_tables(self.segments, self.choice)
            of_row = tensor_weights[self.choice.tensor] * self.choice.expansion
        self.tensor_weights = tensor_weights
        """Of each segment's sums, float64 ``[num_segments]``; those of sampled ones are expanded
        to the whole tensor before."""
        self.arena_elements = tables.arena_elements
        self.num_elements = int(tables.chunks[:, 2].sum())
        self.num_chunks = len(tables.chunks)
        self.num_rows = len(tables.tensor_chunks) - 1
        self._host_chunks = tables.chunks
        self.chunks = torch.from_numpy(tables.chunks).to(device)
        if device.type != "cpu":
            self.tiles = torch.from_numpy(tile_table(tables.chunks[:, 2])).to(device)
        self.tensor_chunks = torch.from_numpy(tables.tensor_chunks).to(device)
        self.weights = torch.from_numpy(of_row.astype(np.float64)).to(device)
        self._staged = [s for s in self.segments if s.staged]

    def rows(self) -> Iterator[tuple[Tensor, slice]]:
        """Of each row of the sums: the elements, flat, and where they lie in every arena."""
        if self.choice is None:
            for s in self.segments:
                yield s.flat, slice(s.offset, s.offset + s.elements)
            return
        offsets, lengths = self._host_chunks[:, 1].tolist(), self._host_chunks[:, 2].tolist()
        places = (self.choice.tensor.tolist(), self.choice.start.tolist(), offsets, lengths)
        for t, start, offset, length in zip(*places, strict=True):
            yield self.segments[t].flat[start : start + length], slice(offset, offset + length)

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
        addresses: of the first element of each tensor, bytes.
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
    aligned = -(-length // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(aligned)])

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
        lengths: of the chunks, in elements.
    """
    small = lengths <= _SMALL_CHUNK
    # Position within the run of small chunks that a chunk belongs to.
    index = np.arange(len(lengths))
    run_start = np.maximum.accumulate(np.where(small, 0, index + 1))
    starts_tile = ~small | ((index - run_start) % _SMALL_CHUNKS_PER_TILE == 0)
    first = np.flatnonzero(starts_tile)
    counts = np.diff(np.append(first, len(lengths)))
    return np.stack([first, counts], axis=1).astype(np.int64)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in any order of the axes."""
    expected = 1
    axes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in axes:
        if size == 0:
            return True
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _segments(
    named: Sequence[Named], distinct: Sequence[int], choice: Choice | None
) -> list[Segment]:
    taken = None
    if choice is not None:
        taken = np.bincount(choice.tensor, _aligned(choice.length), len(distinct)).tolist()
    segments = []
    offset = 0
    for t, i in enumerate(distinct):
        name, alias = named[i]
        staged = alias.is_conj() or alias.is_neg() or not is_dense(alias)
        if staged:
            flat = torch.empty(alias.numel(), dtype=alias.dtype, device=alias.device)
        else:
            flat = alias.as_strided((alias.numel(),), (1,), alias.storage_offset())
        elements = flat.numel() if taken is None else int(taken[t])
        sampled = choice is not None
        segments.append(Segment(name, i, alias, flat, offset, elements, sampled, staged))
        offset += -(-elements // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
    return segments


def _sampled_tables(segments: Sequence[Segment], choice: Choice) -> ChunkTables:
    """Tables of chosen chunks, each of them a row of its own."""
    aligned = _aligned(choice.length)
    ends = np.cumsum(aligned)
    address = np.array([s.flat.data_ptr() for s in segments], np.int64)[choice.tensor]
    dtype = np.array([reference.DTYPES.index(s.flat.dtype) for s in segments], np.int64)
    itemsize = np.array([s.flat.element_size() for s in segments], np.int64)[choice.tensor]
    chunks = np.stack(
        [
            address + choice.start * itemsize,
            ends - aligned,
            choice.length,
            dtype[choice.tensor],
        ],
        axis=1,
    )
    offsets = np.array([s.offset for s in segments], np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return ChunkTables(
        np.ascontiguousarray(chunks), np.arange(len(chunks) + 1, dtype=np.int64), offsets, total
    )


def _aligned(lengths: IntArray) -> IntArray:
    aligned: IntArray = -(-lengths // ALIGN_ELEMENTS) * np.int64(ALIGN_ELEMENTS)
    return aligned


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not tensor.is_complex():
        return tensor
    if tensor.is_conj():
        # The memory holds the conjugates; angles and norms are the same for both.
        tensor = tensor.conj()
    return torch.view_as_real(tensor)


def _distinct(named: list[Named]) -> list[int]:
    """Which to keep of repeated views; refuses tensors that share only part of their memory."""
    by_device: dict[torch.device, list[tuple[int, int, int]]] = {}
    for i, (_, tensor) in enumerate(named):
        begin = tensor.data_ptr()
        end = begin + _span(tensor) * tensor.element_size()
        by_device.setdefault(tensor.device, []).append((begin, end, i))
    repeated = set()
    for spans in by_device.values():
        open_spans: list[tuple[int, int, int]] = []
        for begin, end, i in sorted(s for s in spans if s[0] < s[1]):
            open_spans = [s for s in open_spans if s[1] > begin]
            for _, _, other in open_spans:
                if _same_elements(named[i][1], named[other][1]):
                    repeated.add(max(i, other))
                elif _share_elements(named[i][1], named[other][1]):
                    first, second = (named[j][0] for j in sorted((i, other)))
                    raise ValueError(
                        f"params: {first} and {second} overlap in memory without being "
                        "the same tensor; expected separate or identical parameters"
                    )
            open_spans.append((begin, end, i))
    return [i for i in range(len(named)) if i not in repeated]


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last that the tensor touches, both included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _same_elements(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a.numel() != b.numel():
        return False
    same_view = a.shape == b.shape and a.stride() == b.stride()
    return same_view or (is_dense(a) and is_dense(b))


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans meet have an element in common."""
    if (is_dense(a) and is_dense(b)) or a.dtype != b.dtype:
        return True
    size = a.element_size()
    start = min(a.data_ptr(), b.data_ptr())
    span = max(t.data_ptr() // size + _span(t) for t in (a, b)) - start // size
    if (a.data_ptr() - b.data_ptr()) % size or span > _MAX_COMPARED_SPAN:
        return True
    touched = torch.zeros(span, dtype=torch.bool)
    touched.as_strided(a.shape, a.stride(), (a.data_ptr() - start) // size).fill_(True)
    return bool(touched.as_strided(b.shape, b.stride(), (b.data_ptr() - start) // size).any())
