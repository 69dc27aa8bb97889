"""The global index of a DTensor's local elements, as stretches that are contiguous in it.

It is the position of an element in the whole parameter in row-major order. It does not depend on
the mesh, so that an element meets the same bucket of the table under any sharding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Index = range | NDArray[np.int64]  # global indices along one dimension of a tensor


class Runs(NamedTuple):
    """Stretches of a local tensor that are contiguous in the global order; int64, in elements.

    They cover the local tensor from its first element to its last, and neighbours are never
    contiguous in the global order as well.
    """

    local_offset: NDArray[np.int64]  # [n] of each stretch in the local tensor, ascending
    global_index: NDArray[np.int64]  # [n] of its first element
    length: NDArray[np.int64]  # [n] elements, at least 1


class Cut(NamedTuple):
    """How a mesh dimension cuts a dimension of a tensor."""

    parts: int  # size of the mesh dimension
    which: int  # this rank's coordinate in it
    factor: int  # split_factor of a _StridedShard, 1 for a Shard


def axis_of(size: int, cuts: Sequence[Cut], local: int) -> Index | None:
    """Return the global indices of this rank along one dimension; None if they are not ``local``.

    FSDP2 over tensor parallelism cuts for the last mesh dimension first and writes this down as
    ``_StridedShard``, with the product of the later cuts as the factor. Its own
    ``_split_tensor`` gives the same elements only if the cuts are even: of 7 rows on a 3 x 2 mesh,
    row 6 is on rank 5 in memory and on rank 4 by ``_split_tensor``.
    """
    later, from_the_right = 1, True
    for cut in reversed(cuts):
        from_the_right &= cut.factor == later
        later *= cut.parts
    if from_the_right:
        index: Index = range(size)
        for cut in reversed(cuts):
            index = _chunk(index, cut.parts, cut.which)
        if len(index) == local:
            return index
    index = range(size)
    for cut in cuts:
        pieces = [_chunk(index, cut.factor, i) for i in range(cut.factor)]
        pieces = [_chunk(piece, cut.parts, cut.which) for piece in pieces]
        index = pieces[0] if len(pieces) == 1 else np.concatenate([_array(p) for p in pieces])
    return index if len(index) == local else None


def _chunk(index: Index, parts: int, which: int) -> Index:
    """Return one of the parts that ``torch.chunk`` gives; the last ones may be empty."""
    size = -(-len(index) // parts)
    return index[which * size : (which + 1) * size]


def _array(index: Index) -> NDArray[np.int64]:
    if isinstance(index, range):
        return np.arange(index.start, index.stop, dtype=np.int64)
    return index


def runs_of(shape: Sequence[int], axes: Sequence[Index]) -> Runs | None:
    """Return the stretches of a local tensor; None if it is whole and in order.

    Args:
        shape: of the whole tensor.
        axes: global indices that are here, along each dimension; the local tensor is row-major.
    """
    inner = 1  # elements in the dimensions of which all is here, from the last one on
    last = len(shape) - 1
    while last >= 0 and isinstance(axes[last], range) and len(axes[last]) == shape[last]:
        inner *= shape[last]
        last -= 1
    if last < 0:
        return None
    along = _array(axes[last])
    first = np.flatnonzero(np.diff(along, prepend=-2) != 1)
    lengths = np.diff(first, append=len(along)) * inner
    rows = np.zeros(1, np.int64)
    for size, axis in zip(shape[:last], axes[:last], strict=True):
        rows = (rows[:, None] * size + _array(axis)).ravel()
    index = ((rows[:, None] * shape[last] + along[first]) * inner).ravel()
    length = np.tile(lengths, len(rows))
    if not length.any():
        return no_runs()
    # The end of one row and the beginning of the next one may be neighbours.
    first = np.flatnonzero(np.diff(index, prepend=-1) != np.append(-1, length[:-1]))
    length = np.add.reduceat(length, first)
    return Runs(np.cumsum(length) - length, index[first], length)


def no_runs() -> Runs:
    """Return the stretches of an empty local tensor: none."""
    return Runs(*np.zeros((3, 0), np.int64))
