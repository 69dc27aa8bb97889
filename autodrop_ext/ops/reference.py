"""The operations on tables in plain PyTorch: the specification of every backend.

Symbols follow the papers: ``x`` are parameters after an optimizer step, ``m_i`` their mean over
window ``i``, ``s_i = m_i - m_{i-1}`` its displacement (UAI 2024, Definition 3.3). A table is linear
in ``x``, so that these names also stand for the tables of what they name.

Element ``j`` of a chunk with the rotation ``p``, the swap ``r`` and the hash ``h`` is added to the
lane ``8 ((j // 8 + p) mod 512) + (j mod 8 XOR r)`` of the chunk's row, with the sign of that lane.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .plan import LANES, SWAPS, Table

_BATCH = 256  # pieces at a time: 8 MiB for each of the temporary tensors


def accumulate(table: Tensor, x: Tensor, pieces: Table, rows: Tensor) -> None:
    """Add ``weight * sign * x`` to a hashed table.

    Args:
        table: float64 ``[num_buckets]``.
        x: a tensor's elements in memory order, ``[n]``.
        pieces: those of this tensor.
        rows: row of each piece, int64.
    """
    for begin in range(0, len(pieces), _BATCH):
        part = pieces[begin : begin + _BATCH]

        def column(name: str, part: Table = part) -> Tensor:
            return torch.from_numpy(part[name].astype(np.int64))[:, None]

        i = torch.arange(LANES, device="cpu")  # of the piece, [1, LANES]
        j = column("start") + i
        lane = (j // SWAPS + column("packet")) % (LANES // SWAPS) * SWAPS
        lane = lane + (j % SWAPS ^ column("swap"))
        minus = mix32(column("hash") ^ lane // 32) >> lane % 32 & 1
        value = torch.from_numpy(part["weight"].copy())[:, None] * (1 - 2 * minus)
        element = column("offset") // x.element_size() + i
        inside = i < column("length")
        bucket = (rows[begin : begin + _BATCH, None] * LANES + lane)[inside]
        term = value[inside].to(table.device) * x[element[inside].to(x.device)].to(table)
        table.index_add_(0, bucket.to(table.device), term)


def mix32(x: Tensor) -> Tensor:
    """Scramble 32 bits, held in int64."""
    x = x ^ x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def accumulate_exact(table: Tensor, x: Tensor, spans: Table) -> None:
    """Add ``weight * x`` to a table of one bucket an element.

    Args:
        table: float64 ``[num_buckets]``.
        x: a tensor's elements in memory order, ``[n]``.
        spans: those of this tensor.
    """
    for span in spans:
        at, n = int(span["offset"]) // x.element_size(), int(span["length"])
        bucket = int(span["bucket"])
        table[bucket : bucket + n] += float(span["weight"]) * x[at : at + n].to(table)


def close(A: Tensor, m: Tensor, s: Tensor, divisor: float) -> tuple[float, float]:
    """End a window, and make the tables ready for the next one.

    Args:
        A: running sum, float64 ``[n]``; 0 afterwards.
        m: mean of the window before; afterwards of this one.
        s: displacement of the window before; afterwards of this one.
        divisor: what makes a mean of ``A``.

    Returns:
        ``<s_i, s_{i-1}>`` and ``|s_i|^2``.
    """
    m_new = A / divisor
    s_new = m_new - m
    dot, norm = s_new.dot(s), s_new.dot(s_new)
    A.zero_()
    m.copy_(m_new)
    s.copy_(s_new)
    return float(dot), float(norm)
