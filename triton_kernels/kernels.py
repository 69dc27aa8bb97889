"""Kernels; each program works on one chunk, in blocks of ``BLOCK`` elements.

Arguments that recur:

* ``chunks``: int64 ``[num_chunks, 4]``, the chunk table of ``csrc/core/tables.h``.
* ``rows``: int64 ``[programs]``, the chunks of this launch: all of one dtype and alignment.
* ``DTYPE``: element type of their parameters, ``uint16`` for the bits of bfloat16.
* ``ALIGNED``: they start at multiples of 16 bytes, so that loads can take 16 bytes at a time.
  Arenas always do.
* ``MASKED``: the block reaches past the end of the chunk. Triton knows nothing of the alignment of
  ``i < length``, so a masked load takes one element at a time. Every kernel therefore handles the
  whole blocks of a chunk without a mask, and at most one block with it. The element-wise kernels
  branch inside their loop: a separate loop over the whole blocks was unrolled by ptxas, which then
  spilled on sm_80. The closes have a separate loop, because their branches would yield 16 KiB of
  float64 sums.

Only compile-time arguments have annotations. Triton's compiler evaluates annotations, and refuses a
signature that names a global which is no constexpr, such as ``typing.Any``.

Launch with ``enable_fp_fusion=False``: a fused multiply-add would round once where every other
backend rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    """Elements of a block, zero outside the chunk: zeros add nothing to any sum."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(pointers, values, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, values, mask=inside)
    else:
        tl.store(pointers, values)


@triton.jit
def _as_float32(value, DTYPE: tl.constexpr):
    """Loaded parameters in float32. The bits of a bfloat16 are the upper half of a float32."""
    if DTYPE is tl.uint16:
        return (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _arena_part(chunks, c):
    """Offset of a chunk in the arenas, and its length."""
    return tl.multiple_of(tl.load(chunks + 4 * c + 1), 32), tl.load(chunks + 4 * c + 2)


@triton.jit
def _parameters(chunks, c, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the parameters of a chunk.

    The hint follows the cast: what Triton knows of an integer is lost when it becomes a pointer.
    """
    x = tl.load(chunks + 4 * c).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    return x


@triton.jit
def _add_products(dot, norm, previous_norm, mean_norm, d0, d1, m):
    return dot + d0 * d1, norm + d0 * d0, previous_norm + d1 * d1, mean_norm + m * m


@triton.jit
def _store_sums(row, dot, norm, previous_norm, mean_norm):
    """Fold the lanes of the four sums in a fixed tree."""
    tl.store(row, tl.sum(dot))
    tl.store(row + 1, tl.sum(norm))
    tl.store(row + 2, tl.sum(previous_norm))
    tl.store(row + 3, tl.sum(mean_norm))


@triton.jit
def _accumulate_block(
    x,
    running,
    mean,
    start,
    length,
    weight,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    FIRST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    i = start + tl.arange(0, BLOCK)
    inside = i < length
    value = _load(x + i, inside, MASKED)
    if DELTA:
        m = _load(mean + i, inside, MASKED)
        if DTYPE is tl.float64:
            term = (value - m.to(tl.float64)).to(tl.float32)
        else:
            term = _as_float32(value, DTYPE) - m
    else:
        term = _as_float32(value, DTYPE)
    if WEIGHTED:
        term = term * weight
    if not FIRST:
        term = _load(running + i, inside, MASKED) + term
    _store(running + i, term, inside, MASKED)


@triton.jit
def accumulate_kernel(
    chunks,
    rows,
    running,
    mean,
    weight,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DELTA: tl.constexpr,
    FIRST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``running (=|+=) weight * x`` or ``weight * (x - mean)``."""
    c = tl.load(rows + tl.program_id(0))
    x = _parameters(chunks, c, DTYPE, ALIGNED)
    offset, length = _arena_part(chunks, c)
    a = running + offset
    m = mean + offset
    for start in range(0, length, BLOCK):
        if start + BLOCK <= length:
            _accumulate_block(
                x, a, m, start, length, weight, DTYPE, DELTA, FIRST, WEIGHTED, BLOCK, False
            )
        else:
            _accumulate_block(
                x, a, m, start, length, weight, DTYPE, DELTA, FIRST, WEIGHTED, BLOCK, True
            )


@triton.jit
def _close_sum_block(
    running, previous, before, start, length, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """``k s_i``, ``k s_{i-1}`` and ``k m_i``: float32, as float64."""
    i = start + tl.arange(0, BLOCK)
    inside = i < length
    a = _load(running + i, inside, MASKED)
    p = _load(previous + i, inside, MASKED)
    b = _load(before + i, inside, MASKED)
    return (a - p).to(tl.float64), (p - b).to(tl.float64), a.to(tl.float64)


@triton.jit
def close_sum_kernel(chunks, running, previous, before, partials, BLOCK: tl.constexpr):
    """Unscaled sums of a chunk into its row of ``partials``, float64 ``[num_chunks, 4]``."""
    c = tl.program_id(0).to(tl.int64)
    offset, length = _arena_part(chunks, c)
    a = running + offset
    p = previous + offset
    b = before + offset
    dot = tl.zeros([BLOCK], tl.float64)
    norm = tl.zeros([BLOCK], tl.float64)
    previous_norm = tl.zeros([BLOCK], tl.float64)
    mean_norm = tl.zeros([BLOCK], tl.float64)
    whole = length // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        d0, d1, m = _close_sum_block(a, p, b, start, length, BLOCK, False)
        dot, norm, previous_norm, mean_norm = _add_products(
            dot, norm, previous_norm, mean_norm, d0, d1, m
        )
    if whole < length:
        d0, d1, m = _close_sum_block(a, p, b, whole, length, BLOCK, True)
        dot, norm, previous_norm, mean_norm = _add_products(
            dot, norm, previous_norm, mean_norm, d0, d1, m
        )
    _store_sums(partials + 4 * c, dot, norm, previous_norm, mean_norm)


@triton.jit
def _close_delta_block(
    running,
    previous,
    mean,
    start,
    length,
    k,
    per_step,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``close_delta_element`` of ``csrc/core/delta.h``, which gives the reasons, for a block."""
    i = start + tl.arange(0, BLOCK)
    inside = i < length
    a = _load(running + i, inside, MASKED)
    s = _load(previous + i, inside, MASKED)
    old = _load(mean + i, inside, MASKED)

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

    _store(running + i, bits.to(tl.float32, bitcast=True), inside, MASKED)
    _store(previous + i, ((code * unit) * k).to(tl.float32), inside, MASKED)
    _store(mean + i, new, inside, MASKED)
    return d0, d1, m


@triton.jit
def close_delta_kernel(chunks, running, previous, mean, partials, window, BLOCK: tl.constexpr):
    """Unscaled sums of a chunk as in ``close_sum_kernel``; moves the arenas to the next window.

    ``window`` points to an int64: a plain 1 would be specialised away.
    """
    c = tl.program_id(0).to(tl.int64)
    offset, length = _arena_part(chunks, c)
    a = running + offset
    s = previous + offset
    old = mean + offset
    k = tl.load(window).to(tl.float64)
    per_step = 1.0 / k
    dot = tl.zeros([BLOCK], tl.float64)
    norm = tl.zeros([BLOCK], tl.float64)
    previous_norm = tl.zeros([BLOCK], tl.float64)
    mean_norm = tl.zeros([BLOCK], tl.float64)
    whole = length // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        d0, d1, m = _close_delta_block(a, s, old, start, length, k, per_step, BLOCK, False)
        dot, norm, previous_norm, mean_norm = _add_products(
            dot, norm, previous_norm, mean_norm, d0, d1, m
        )
    if whole < length:
        d0, d1, m = _close_delta_block(a, s, old, whole, length, k, per_step, BLOCK, True)
        dot, norm, previous_norm, mean_norm = _add_products(
            dot, norm, previous_norm, mean_norm, d0, d1, m
        )
    _store_sums(partials + 4 * c, dot, norm, previous_norm, mean_norm)


@triton.jit
def tensor_kernel(tensor_chunks, partials, per_tensor, BLOCK: tl.constexpr):
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
def _write_back_block(
    x,
    arena,
    mean,
    start,
    length,
    factor,
    DTYPE: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    i = start + tl.arange(0, BLOCK)
    inside = i < length
    value = _load(arena + i, inside, MASKED).to(tl.float64) * factor
    if WITH_MEAN:
        value = _load(mean + i, inside, MASKED).to(tl.float64) + value
    if DTYPE is not tl.float64:
        value = value.to(tl.float32)
    if DTYPE is tl.uint16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
        value = tl.where(value == value, rounded, 0x7FC0)
    _store(x + i, value.to(DTYPE), inside, MASKED)


@triton.jit
def write_back_kernel(
    chunks,
    rows,
    arena,
    mean,
    scale,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``x = scale * arena``, or ``mean + scale * arena``; ``scale`` points to a float64."""
    c = tl.load(rows + tl.program_id(0))
    x = _parameters(chunks, c, DTYPE, ALIGNED)
    offset, length = _arena_part(chunks, c)
    a = arena + offset
    m = mean + offset
    factor = tl.load(scale)
    for start in range(0, length, BLOCK):
        if start + BLOCK <= length:
            _write_back_block(x, a, m, start, length, factor, DTYPE, WITH_MEAN, BLOCK, False)
        else:
            _write_back_block(x, a, m, start, length, factor, DTYPE, WITH_MEAN, BLOCK, True)
