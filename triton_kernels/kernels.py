"""Kernels; each program works on one chunk, in blocks of ``BLOCK`` elements.

Arguments that recur:

* ``chunks``: int64 ``[num_chunks, 4]``, the chunk table of ``csrc/core/tables.h``.
* ``rows``: int64 ``[programs]``, the chunks of this launch: all of one dtype and alignment.
* ``DTYPE``: element type of their parameters, ``uint16`` for the bits of bfloat16.
* ``ALIGNED``: they start at multiples of 16 bytes, so that loads can take 16 bytes at a time.
  Arenas always do.

Launch with ``enable_fp_fusion=False``: a fused multiply-add would round once where every other
backend rounds twice.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _as_float32(value: Any, DTYPE: tl.constexpr) -> Any:
    """What was loaded, in float32; the bits of bfloat16 are its upper half."""
    if DTYPE is tl.uint16:
        return (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _chunk(chunks: Any, c: Any, DTYPE: tl.constexpr, ALIGNED: tl.constexpr) -> Any:
    """Pointer to the parameters, offset in the arenas, length."""
    address = tl.load(chunks + 4 * c)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    offset = tl.multiple_of(tl.load(chunks + 4 * c + 1), 32)
    return address.to(tl.pointer_type(DTYPE)), offset, tl.load(chunks + 4 * c + 2)


@triton.jit
def _store_sums(row: Any, dot: Any, norm: Any, previous_norm: Any, mean_norm: Any) -> None:
    """Fold the lanes of the four sums in a fixed tree."""
    tl.store(row, tl.sum(dot))
    tl.store(row + 1, tl.sum(norm))
    tl.store(row + 2, tl.sum(previous_norm))
    tl.store(row + 3, tl.sum(mean_norm))


@triton.jit
def accumulate_kernel(
    chunks: Any,
    rows: Any,
    running: Any,
    mean: Any,
    weight: Any,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DELTA: tl.constexpr,
    FIRST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``running (=|+=) weight * x`` or ``weight * (x - mean)``."""
    x, offset, length = _chunk(chunks, tl.load(rows + tl.program_id(0)), DTYPE, ALIGNED)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < length
        value = tl.load(x + i, mask=inside, other=0)
        if DELTA:
            m = tl.load(mean + offset + i, mask=inside, other=0.0)
            if DTYPE is tl.float64:
                term = (value - m.to(tl.float64)).to(tl.float32)
            else:
                term = _as_float32(value, DTYPE) - m
        else:
            term = _as_float32(value, DTYPE)
        if WEIGHTED:
            term = term * weight
        if not FIRST:
            term = tl.load(running + offset + i, mask=inside, other=0.0) + term
        tl.store(running + offset + i, term, mask=inside)


@triton.jit
def close_sum_kernel(
    chunks: Any, running: Any, previous: Any, before: Any, partials: Any, BLOCK: tl.constexpr
) -> None:
    """Unscaled sums of a chunk into its row of ``partials``, float64 ``[num_chunks, 4]``."""
    c = tl.program_id(0).to(tl.int64)
    offset = tl.multiple_of(tl.load(chunks + 4 * c + 1), 32)
    length = tl.load(chunks + 4 * c + 2)
    dot = tl.zeros([BLOCK], tl.float64)
    norm = tl.zeros([BLOCK], tl.float64)
    previous_norm = tl.zeros([BLOCK], tl.float64)
    mean_norm = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < length
        a = tl.load(running + offset + i, mask=inside, other=0.0)
        p = tl.load(previous + offset + i, mask=inside, other=0.0)
        b = tl.load(before + offset + i, mask=inside, other=0.0)
        d0 = (a - p).to(tl.float64)
        d1 = (p - b).to(tl.float64)
        m = a.to(tl.float64)
        dot += d0 * d1
        norm += d0 * d0
        previous_norm += d1 * d1
        mean_norm += m * m
    _store_sums(partials + 4 * c, dot, norm, previous_norm, mean_norm)


@triton.jit
def close_delta_kernel(
    chunks: Any,
    running: Any,
    previous: Any,
    mean: Any,
    partials: Any,
    window: Any,
    BLOCK: tl.constexpr,
) -> None:
    """As ``close_delta_element`` of ``csrc/core/delta.h``, which says why.

    ``window`` points to an int64: a plain 1 would be specialised away.
    """
    c = tl.program_id(0).to(tl.int64)
    offset = tl.multiple_of(tl.load(chunks + 4 * c + 1), 32)
    length = tl.load(chunks + 4 * c + 2)
    k = tl.load(window).to(tl.float64)
    per_step = 1.0 / k
    dot = tl.zeros([BLOCK], tl.float64)
    norm = tl.zeros([BLOCK], tl.float64)
    previous_norm = tl.zeros([BLOCK], tl.float64)
    mean_norm = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < length
        a = tl.load(running + offset + i, mask=inside, other=0.0)
        s = tl.load(previous + offset + i, mask=inside, other=0.0)
        old = tl.load(mean + offset + i, mask=inside, other=0.0)

        packed = s.to(tl.int32, bitcast=True)
        d0 = a.to(tl.float64)
        d1 = (packed & -256).to(tl.float32, bitcast=True).to(tl.float64)
        residual = ((packed << 24) >> 24).to(tl.float64) * (
            tl.abs(old).to(tl.float64) * 4.656612873077393e-10  # 2^-31
        )
        exact = (old.to(tl.float64) - residual) + d0 * per_step
        new = exact.to(tl.float32)
        m = new.to(tl.float64)
        unit = tl.abs(new).to(tl.float64) * 4.656612873077393e-10
        # A mean of exactly zero has no unit: what it lost, if anything, exceeds every code.
        ratio = (m - exact) / tl.where(unit == 0.0, 1e-300, unit)
        code = (ratio + 6755399441055744.0) - 6755399441055744.0  # to even
        code = tl.minimum(tl.maximum(code, -127.0), 127.0)
        code = tl.where(ratio == ratio, code, 0.0)
        bits = (a.to(tl.int32, bitcast=True) + 128) & -256
        bits = bits | (code.to(tl.int32) & 255)

        tl.store(running + offset + i, bits.to(tl.float32, bitcast=True), mask=inside)
        tl.store(previous + offset + i, ((code * unit) * k).to(tl.float32), mask=inside)
        tl.store(mean + offset + i, new, mask=inside)
        dot += d0 * d1
        norm += d0 * d0
        previous_norm += d1 * d1
        mean_norm += m * m
    _store_sums(partials + 4 * c, dot, norm, previous_norm, mean_norm)


@triton.jit
def tensor_kernel(tensor_chunks: Any, partials: Any, per_tensor: Any, BLOCK: tl.constexpr) -> None:
    """Add up the rows of one tensor's chunks, a program per tensor, in a fixed order."""
    t = tl.program_id(0).to(tl.int64)
    begin = tl.load(tensor_chunks + t)
    end = tl.load(tensor_chunks + t + 1)
    for column in tl.static_range(4):
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(begin, end, BLOCK):
            row = start + tl.arange(0, BLOCK)
            total += tl.load(partials + 4 * row + column, mask=row < end, other=0.0)
        tl.store(per_tensor + 4 * t + column, tl.sum(total))


@triton.jit
def write_back_kernel(
    chunks: Any,
    rows: Any,
    arena: Any,
    mean: Any,
    scale: Any,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``x = scale * arena``, or ``mean + scale * arena``; ``scale`` points to a float64."""
    x, offset, length = _chunk(chunks, tl.load(rows + tl.program_id(0)), DTYPE, ALIGNED)
    factor = tl.load(scale)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < length
        value = tl.load(arena + offset + i, mask=inside, other=0.0).to(tl.float64) * factor
        if WITH_MEAN:
            value = tl.load(mean + offset + i, mask=inside, other=0.0).to(tl.float64) + value
        if DTYPE is not tl.float64:
            value = value.to(tl.float32)
        if DTYPE is tl.uint16:
            bits = value.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
            value = tl.where(value == value, rounded, 0x7FC0)
        tl.store(x + i, value.to(DTYPE), mask=inside)
