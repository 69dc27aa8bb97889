"""Kernels over the table of a window; ``csrc/core/tables.h`` has the layout of their arguments.

A program of :func:`accumulate_kernel` adds the pieces of one run, which have one row and one
exclusive or ("swap") of lanes within a packet. It keeps its sums in the order of elements, so that
loads are contiguous, and puts them into the order of lanes when it stores them, once. Every run has
a row of partial sums therefore, and :func:`add_partials_kernel` adds them in a fixed order.

Arguments that recur:

* ``pieces``, ``spans``: int64 ``[n, 4]``, rows of ``Piece`` and ``Span``.
* ``bases``: int64 ``[num_tensors]``, addresses of the tensors' first elements.
* ``DTYPES``: the dtypes that occur, bit ``d`` for ``DType`` ``d``. Code for others is not compiled.

Triton knows nothing of the alignment of ``i < length``, so a masked load takes one element at a
time. Every kernel therefore has two branches: one without masks, for addresses that are multiples
of 16 bytes, and one for everything else. Bfloat16 is read as its bits, for which NumPy has a type.

Only compile-time arguments have annotations. Triton's compiler evaluates annotations, and refuses a
signature that names a global which is no constexpr, such as ``typing.Any``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(address, offsets, inside, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Load elements from an address.

    The hint follows the cast: what Triton knows of an integer is lost when it becomes a pointer.
    """
    pointer = address.to(tl.pointer_type(TYPE))
    if WHOLE:
        return tl.load(tl.multiple_of(pointer, 16) + offsets)
    else:
        return tl.load(pointer + offsets, mask=inside, other=0)


@triton.jit
def _with_sign(x, sign):
    """Return float32 ``x`` as float64, negative where the highest bit of ``sign`` is set."""
    bits = x.to(tl.uint32, bitcast=True) ^ (sign & 0x80000000)
    return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _signed(address, offsets, inside, sign, dtype, DTYPES: tl.constexpr, WHOLE: tl.constexpr):
    """Load elements of any dtype as float64 with the highest bit of ``sign`` as their sign's."""
    if DTYPES == 1:
        result = _with_sign(_load(address, offsets, inside, tl.float32, WHOLE), sign)
    elif DTYPES == 2:
        bits = _load(address, offsets, inside, tl.float64, WHOLE).to(tl.uint64, bitcast=True)
        bits ^= (sign & 0x80000000).to(tl.uint64) << 32
        result = bits.to(tl.float64, bitcast=True)
    elif DTYPES == 4:
        half = _load(address, offsets, inside, tl.float16, WHOLE)
        result = _with_sign(half.to(tl.float32), sign)
    elif DTYPES == 8:
        half = _load(address, offsets, inside, tl.uint16, WHOLE)
        result = _with_sign((half.to(tl.uint32) << 16).to(tl.float32, bitcast=True), sign)
    else:  # the highest that occurs, or one of the others
        FIRST: tl.constexpr = 8 if DTYPES >= 8 else 4 if DTYPES >= 4 else 2
        CODE: tl.constexpr = 3 if DTYPES >= 8 else 2 if DTYPES >= 4 else 1
        if dtype == CODE:
            result = _signed(address, offsets, inside, sign, dtype, FIRST, WHOLE)
        else:
            result = _signed(address, offsets, inside, sign, dtype, DTYPES - FIRST, WHOLE)
    return result


@triton.jit
def _mix32(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row(table, index, inside):
    """Load a row of four int64, zeros outside of the table."""
    at = table + 4 * index
    return (
        tl.load(at, mask=inside, other=0),
        tl.load(at + 1, mask=inside, other=0),
        tl.load(at + 2, mask=inside, other=0),
        tl.load(at + 3, mask=inside, other=0),
    )


@triton.jit
def _bytes(dtype):
    """Return the size of an element of a ``DType``."""
    return tl.where(dtype == 0, 4, tl.where(dtype == 1, 8, 2))


@triton.jit
def accumulate_kernel(pieces, runs, bases, partials, buckets, splits, DTYPES: tl.constexpr):
    """Write sums of pieces to ``partials``, float64 ``[8 * splits, buckets]``.

    Program ``(8 row + swap, split)`` adds the pieces ``split``, ``split + splits``, ... of its run
    and writes the row ``swap * splits + split``, of which it owns the lanes of its table's row.
    """
    run = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    swap = (run % 8).to(tl.int32)
    packet = tl.arange(0, 512)[:, None]
    i = tl.arange(0, 8)[None, :]
    # Left shift that moves a lane's bit of a word of signs to the highest.
    up = (31 - ((packet & 3) * 8 + (i ^ swap))).to(tl.uint32)
    sums = tl.zeros([512, 8], tl.float64)

    # Each row is loaded one piece ahead, so that its latency is not added to that of elements.
    index = tl.load(runs + run) + split
    end = tl.load(runs + run + 1)
    offset, weight, named, place = _row(pieces, index, index < end)
    while index < end:
        index += splits
        base = tl.load(bases + (named >> 32))
        hashed = named.to(tl.uint32)
        start = (place & 0xFFFF).to(tl.int32)
        length = ((place >> 16) & 0xFFFF).to(tl.int32)
        rotation = ((place >> 32) & 0xFFFF).to(tl.int32)
        dtype = ((place >> 56) & 0xFF).to(tl.int32)
        scale = weight.to(tl.float64, bitcast=True)
        origin = base + offset - start * _bytes(dtype)
        offset, weight, named, place = _row(pieces, index, index < end)

        sign = _mix32(hashed ^ (packet >> 2).to(tl.uint32)) << up
        j = ((packet - rotation) & 511) * 8 + i
        if (origin % 16 == 0) & (length == 4096):
            x = _signed(origin, j, j, sign, dtype, DTYPES, True)
        else:
            inside = (j >= start) & (j < start + length)
            x = _signed(origin, j, inside, sign, dtype, DTYPES, False)
        sums = tl.fma(x, scale, sums)

    row = partials + (swap.to(tl.int64) * splits + split) * buckets + (run // 8) * 4096
    tl.store(row + packet * 8 + (i ^ swap), sums)


@triton.jit
def add_partials_kernel(partials, table, buckets, count, BLOCK: tl.constexpr):
    """``table += partials[0] + ... + partials[count - 1]``, each float64 ``[buckets]``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(partials + i)
    for n in range(1, count):
        total += tl.load(partials + n * buckets.to(tl.int64) + i)
    tl.store(table + i, tl.load(table + i) + total)


@triton.jit
def _add_span(
    origin,
    table,
    bucket,
    start,
    length,
    scale,
    dtype,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i = start + tl.arange(0, BLOCK)
    inside = i < length
    zero = tl.zeros([BLOCK], tl.uint32)
    to = table + bucket
    x = _signed(origin, i, inside, zero, dtype, DTYPES, WHOLE)
    if WHOLE:
        # The hint must be in the function that makes the pointer.
        buckets = tl.multiple_of(to, 16) + i
        tl.store(buckets, tl.fma(x, scale, tl.load(buckets)))
    else:
        old = tl.load(to + i, mask=inside, other=0.0)
        tl.store(to + i, tl.fma(x, scale, old), mask=inside)


@triton.jit
def accumulate_exact_kernel(spans, bases, table, DTYPES: tl.constexpr, BLOCK: tl.constexpr):
    """``table[bucket + i] += weight * x[i]``, a program for each span."""
    offset, weight, bucket, named = _row(spans, tl.program_id(0).to(tl.int64), True)
    length = ((named >> 32) & 0xFFFF).to(tl.int32)
    dtype = ((named >> 56) & 0xFF).to(tl.int32)
    scale = weight.to(tl.float64, bitcast=True)
    origin = tl.load(bases + (named & 0xFFFFFFFF)) + offset
    aligned = (origin % 16 == 0) & (bucket % 2 == 0)
    for start in range(0, length, BLOCK):
        if aligned & (start + BLOCK <= length):
            _add_span(origin, table, bucket, start, length, scale, dtype, DTYPES, BLOCK, True)
        else:
            _add_span(origin, table, bucket, start, length, scale, dtype, DTYPES, BLOCK, False)


@triton.jit
def _close_block(
    running,
    mean,
    displacement,
    start,
    end,
    divisor,
    dot,
    norm,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    inside = start + i < end
    if WHOLE:
        a_at = tl.multiple_of(running + start, 16) + i
        m_at = tl.multiple_of(mean + start, 16) + i
        s_at = tl.multiple_of(displacement + start, 16) + i
        a = tl.load(a_at)
        m = a / divisor
        s = m - tl.load(m_at)
        before = tl.load(s_at)
        tl.store(a_at, tl.zeros_like(a))
        tl.store(m_at, m)
        tl.store(s_at, s)
    else:
        a_at = running + start + i
        m_at = mean + start + i
        s_at = displacement + start + i
        a = tl.load(a_at, mask=inside, other=0.0)
        m = a / divisor
        s = m - tl.load(m_at, mask=inside, other=0.0)
        before = tl.load(s_at, mask=inside, other=0.0)
        tl.store(a_at, tl.zeros_like(a), mask=inside)
        tl.store(m_at, m, mask=inside)
        tl.store(s_at, s, mask=inside)
    return tl.fma(s, before, dot), tl.fma(s, s, norm)


@triton.jit
def close_kernel(
    running, mean, displacement, divisor_bits, blocks, block_sums, BLOCK: tl.constexpr
):
    """Close a window over blocks of buckets, a program for each.

    Args:
        running, mean, displacement: float64 tables; see ``csrc/cuda/table.h``.
        divisor_bits: float64 as an int64, because Triton rounds a float argument to float32.
        blocks: int64 ``[num_blocks, 2]``, first bucket and the one after the last.
        block_sums: float64 ``[num_blocks, 2]``, ``<s_i, s_{i-1}>`` and ``|s_i|^2`` of each.
        BLOCK: buckets at a time.
    """
    b = tl.program_id(0).to(tl.int64)
    begin = tl.load(blocks + 2 * b)
    end = tl.load(blocks + 2 * b + 1)
    divisor = divisor_bits.to(tl.float64, bitcast=True)
    dot = tl.zeros([BLOCK], tl.float64)
    norm = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        if (begin % 2 == 0) & (start + BLOCK <= end):
            dot, norm = _close_block(
                running, mean, displacement, start, end, divisor, dot, norm, BLOCK, True
            )
        else:
            dot, norm = _close_block(
                running, mean, displacement, start, end, divisor, dot, norm, BLOCK, False
            )
    tl.store(block_sums + 2 * b, tl.sum(dot))
    tl.store(block_sums + 2 * b + 1, tl.sum(norm))
