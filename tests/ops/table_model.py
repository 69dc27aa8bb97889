"""The table in NumPy, as its specification says: what every backend's kernels are compared with."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

LANES = 4096
FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)
BYTES = {FLOAT32: 4, FLOAT64: 8, FLOAT16: 2, BFLOAT16: 2}

PIECE = np.dtype(
    [
        ("offset", "<i8"),
        ("weight", "<f8"),
        ("hash", "<u4"),
        ("tensor", "<u4"),
        ("start", "<u2"),
        ("length", "<u2"),
        ("packet", "<u2"),
        ("swap", "u1"),
        ("dtype", "u1"),
    ]
)
SPAN = np.dtype(
    [
        ("offset", "<i8"),
        ("weight", "<f8"),
        ("bucket", "<i8"),
        ("tensor", "<u4"),
        ("length", "<u2"),
        ("unused", "u1"),
        ("dtype", "u1"),
    ]
)

Float64s = npt.NDArray[np.float64]


def mix64(x: int) -> int:
    """splitmix64."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
    return x ^ x >> 31


def mix32(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


@dataclasses.dataclass
class Tensor:
    """One local tensor, or some elements of one.

    Attributes:
        memory: bytes that contain the elements.
        shift: bytes of ``memory`` before the first element.
        dtype: of the elements.
        length: elements.
        first: position of the first element in the whole parameter.
        weight: of its elements.
        group: table that it is added to.
        key: hash of the parameter's name.
    """

    memory: npt.NDArray[np.uint8]
    shift: int
    dtype: int
    length: int
    first: int = 0
    weight: float = 1.0
    group: int = 0
    key: int = 0

    @classmethod
    def of(
        cls,
        values: npt.ArrayLike,
        dtype: int = FLOAT32,
        *,
        shift: int = 0,
        first: int = 0,
        weight: float = 1.0,
        group: int = 0,
        name: str = "",
    ) -> Tensor:
        """Elements rounded to ``dtype``, their first ``shift`` elements past an aligned address."""
        raw = encode(np.asarray(values, dtype=np.float64).ravel(), dtype).view(np.uint8)
        before = shift * BYTES[dtype]
        memory = np.zeros(before + raw.size + 64, dtype=np.uint8)
        before += -memory.ctypes.data % 64
        memory[before : before + raw.size] = raw
        key = mix64(zlib.crc32(name.encode()))
        length = raw.size // BYTES[dtype]
        return cls(memory, before, dtype, length, first, weight, group, key)

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data) + self.shift

    def values(self) -> Float64s:
        """Its elements, exactly."""
        raw = self.memory[self.shift : self.shift + self.length * BYTES[self.dtype]].copy()
        return decode(raw, self.dtype)


def encode(values: Float64s, dtype: int) -> npt.NDArray[np.generic]:
    """Values rounded to a type; bfloat16 as its bits, rounded towards zero."""
    if dtype == BFLOAT16:
        bits = values.astype(np.float32).view(np.uint32)
        return (bits >> np.uint32(16)).astype(np.uint16)
    return values.astype({FLOAT32: np.float32, FLOAT64: np.float64, FLOAT16: np.float16}[dtype])


def decode(raw: npt.NDArray[np.uint8], dtype: int) -> Float64s:
    """Values of the bytes of a type, exactly."""
    if dtype == BFLOAT16:
        bits = raw.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).astype(np.float64)
    native = {FLOAT32: np.float32, FLOAT64: np.float64, FLOAT16: np.float16}[dtype]
    return raw.view(native).astype(np.float64)


def pieces_of(
    tensors: Sequence[Tensor], rows: int, groups: int = 1
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
    """Pieces of tensors, sorted, and their runs: PIECE[n] and int64[groups * rows * 8 + 1]."""
    found = []
    for index, tensor in enumerate(tensors):
        for begin, chunk, start, length in _stretches(tensor):
            c = mix64(tensor.key ^ mix64(chunk))
            row = (c >> 32) % rows + tensor.group * rows
            piece = (
                begin * BYTES[tensor.dtype],
                tensor.weight,
                mix64(c) >> 32,
                index,
                start,
                length,
                (c >> 3) & 511,
                c & 7,
                tensor.dtype,
            )
            found.append((row * 8 + (c & 7), piece))
    found.sort(key=lambda entry: entry[0])
    pieces = np.array([piece for _, piece in found], dtype=PIECE)
    at = np.array([run for run, _ in found], dtype=np.int64)
    runs = np.searchsorted(at, np.arange(groups * rows * 8 + 1)).astype(np.int64)
    return pieces, runs


def _stretches(tensor: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(element, chunk, element of the chunk, length) of every stretch inside one chunk."""
    begin = 0
    while begin < tensor.length:
        chunk, start = divmod(tensor.first + begin, LANES)
        length = min(LANES - start, tensor.length - begin)
        yield begin, chunk, start, length
        begin += length


def spans_of(
    tensors: Sequence[Tensor], buckets: Sequence[int], longest: int = 8192
) -> npt.NDArray[np.void]:
    """Spans of tensors whose first elements go to ``buckets``, sorted: SPAN[n]."""
    found = []
    for index, (tensor, bucket) in enumerate(zip(tensors, buckets, strict=True)):
        for begin in range(0, tensor.length, longest):
            length = min(longest, tensor.length - begin)
            offset = begin * BYTES[tensor.dtype]
            span = (offset, tensor.weight, bucket + begin, index, length, 0, tensor.dtype)
            found.append(span)
    found.sort(key=lambda span: span[2])
    return np.array(found, dtype=SPAN)


def bases_of(tensors: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    """Address of each tensor's first element."""
    return np.array([tensor.address for tensor in tensors], dtype=np.int64)


def accumulate(
    pieces: npt.NDArray[np.void],
    runs: npt.NDArray[np.int64],
    tensors: Sequence[Tensor],
    table: Float64s,
    sizes: Float64s,
) -> None:
    """Add pieces to ``table`` float64[rows, LANES], and absolute values to ``sizes`` of its shape.

    ``sizes`` is the scale of what a sum's rounding may cost.
    """
    values = [tensor.values() for tensor in tensors]
    for run in range(len(runs) - 1):
        row = run // 8
        for piece in pieces[runs[run] : runs[run + 1]]:
            start, length, packet, swap = (
                int(piece[name]) for name in ("start", "length", "packet", "swap")
            )
            tensor = int(piece["tensor"])
            first = int(piece["offset"]) // BYTES[int(piece["dtype"])]
            x = values[tensor][first : first + length] * piece["weight"]
            j = np.arange(start, start + length)
            lane = (((j >> 3) + packet) & 511) << 3 | ((j & 7) ^ swap)
            word = mix32(piece["hash"] ^ (lane >> 5).astype(np.uint32))
            minus = (word >> (lane & 31).astype(np.uint32)) & np.uint32(1)
            table[row, lane] += np.where(minus == 1, -x, x)
            sizes[row, lane] += np.abs(x)


def accumulate_exact(
    spans: npt.NDArray[np.void], tensors: Sequence[Tensor], table: Float64s, sizes: Float64s
) -> None:
    """Add spans to ``table`` float64[buckets], and absolute values to ``sizes`` of its shape."""
    values = [tensor.values() for tensor in tensors]
    for span in spans:
        first = int(span["offset"]) // BYTES[int(span["dtype"])]
        bucket, length = int(span["bucket"]), int(span["length"])
        x = values[int(span["tensor"])][first : first + length] * span["weight"]
        table[bucket : bucket + length] += x
        sizes[bucket : bucket + length] += np.abs(x)


def close(
    running: Float64s,
    mean: Float64s,
    displacement: Float64s,
    divisor: float,
    bounds: npt.NDArray[np.int64],
) -> Float64s:
    """Close a window in place; return float64[num_parts, 2], the sums (dot, norm) of every part."""
    m = running / divisor
    s = m - mean
    sums = [
        (np.sum(s[a:b] * displacement[a:b]), np.sum(s[a:b] ** 2))
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    displacement[:] = s
    mean[:] = m
    running[:] = 0
    return np.array(sums, dtype=np.float64).reshape(-1, 2)
