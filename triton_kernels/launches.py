"""Launches of the table's kernels: grids, warps, and what Triton must be told at compile time.

Torch's current device must be that of the tensors; launches go to its current stream. Where a
product is added, the kernels say ``fma``; nothing else may be fused, whatever Triton's default.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from . import table as kernels

LANES, SWAPS = 4096, 8
BLOCK = 1024
"""Elements that a program has in flight in kernels that read several tables."""

PARTIALS_BLOCK = 512

CLOSE_BLOCK = 512
"""Twice as many made ptxas use 252 registers, for the divisions."""

THREADS = 256
"""Of a program that holds a row of 4,096 lanes, as in CUDA."""


def accumulate(
    pieces: Tensor,
    runs: Tensor,
    bases: Tensor,
    partials: Tensor,
    table: Tensor,
    dtypes: Iterable[int],
) -> None:
    """Add pieces to a sketch: two launches.

    Args:
        pieces: int64 ``[num_pieces, 4]``, rows of ``Piece`` (``csrc/core/tables.h``).
        runs: int64 ``[num_rows * 8 + 1]``.
        bases: int64 ``[num_tensors]``.
        partials: float64 ``[8 * splits, num_rows * 4096]``, overwritten; so many programs share a
            row.
        table: float64, ``num_rows * 4096`` buckets.
        dtypes: codes that occur in ``pieces``.
    """
    buckets = table.numel()
    if not buckets or not len(pieces):
        return
    splits = len(partials) // SWAPS
    kernels.accumulate_kernel[(buckets // LANES * SWAPS, splits)](
        pieces,
        runs,
        bases,
        partials,
        buckets,
        splits,
        DTYPES=_bits(dtypes),
        enable_fp_fusion=False,
        num_warps=THREADS // _warp(table.device),
    )
    kernels.add_partials_kernel[(buckets // PARTIALS_BLOCK,)](
        partials, table, buckets, len(partials), BLOCK=PARTIALS_BLOCK, enable_fp_fusion=False
    )


def accumulate_exact(spans: Tensor, bases: Tensor, table: Tensor, dtypes: Iterable[int]) -> None:
    """Add spans to a table that has a bucket for every element: one launch.

    Args:
        spans: int64 ``[num_spans, 4]``, rows of ``Span``.
        bases: int64 ``[num_tensors]``.
        table: float64 ``[num_buckets]``.
        dtypes: codes that occur in ``spans``.
    """
    if len(spans):
        kernels.accumulate_exact_kernel[(len(spans),)](
            spans, bases, table, DTYPES=_bits(dtypes), BLOCK=BLOCK, enable_fp_fusion=False
        )


def close(
    running: Tensor,
    mean: Tensor,
    displacement: Tensor,
    divisor: float,
    blocks: Tensor,
    block_sums: Tensor,
) -> None:
    """Close a window, as ``csrc/cuda/table.h`` says: one launch.

    Args:
        running, mean, displacement: float64 ``[n]``.
        divisor: what makes a mean of ``running``.
        blocks: int64 ``[num_blocks, 2]``.
        block_sums: float64 ``[num_blocks, 2]``, overwritten.
    """
    if len(blocks):
        (bits,) = struct.unpack("<q", struct.pack("<d", divisor))
        kernels.close_kernel[(len(blocks),)](
            running,
            mean,
            displacement,
            bits,
            blocks,
            block_sums,
            BLOCK=CLOSE_BLOCK,
            enable_fp_fusion=False,
        )


@functools.cache
def _warp(device: torch.device) -> int:
    """Return the threads of a warp: 64 on AMD's Instinct GPUs, 32 on others."""
    if device.type == "cpu":  # the interpreter
        return 32
    size: int = torch.cuda.get_device_properties(device).warp_size
    return size


def _bits(dtypes: Iterable[int]) -> int:
    return sum(1 << dtype for dtype in set(dtypes))
