"""How far each chunk of the parameters moves in a window: what a sample is drawn by.

A few elements at a time are copied at the beginning of a window and compared with the parameters a
window later. So the whole model is looked at in at most eight windows. Models above eight million
float32 parameters need half a byte a parameter for that time, and every parameter is read twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.memory import needing
from ..ops.plan import Plan
from .draw import UNIT, FloatArray, chunk_starts, num_chunks

MOST_WINDOWS = 8
LEAST_ELEMENTS = 1 << 20
"""Looked at in a window, so that small models are through soon: 4 MiB of float32."""

_LARGEST = 1e30  # a chunk that moved farther belongs to training that diverges

_ADVICE = (
    "a survey of the parameters copies an eighth of them in each of its windows, so that a sample "
    "can be drawn; params= watches fewer parameters"
)

_SLICE = 1 << 20  # elements compared at a time: 12 MiB of temporaries


class _Piece(NamedTuple):
    """Chunks of one tensor: their elements, and where their motion goes."""

    flat: Tensor
    starts: list[int]
    motion: FloatArray


def num_windows(elements: float | None) -> int:
    """Windows that a survey takes.

    Args:
        elements: elements on each rank, a number that all ranks know; None if they do not.
    """
    if elements is None:
        return MOST_WINDOWS
    return min(MOST_WINDOWS, max(1, -(-int(elements) // LEAST_ELEMENTS)))


class Survey:
    """Goes over the tensors of some plans, one share of them a window.

    Args:
        plans: one for each device, which read everything.
        windows: how many shares there are.

    Attributes:
        motion: ``|x_after - x_before|^2`` of each chunk by name of the tensor, float32 numbers.
    """

    def __init__(self, plans: Sequence[Plan], windows: int) -> None:
        self._plans = plans
        self.motion: dict[str, FloatArray] = {
            s.name: np.zeros(num_chunks(s.flat.numel())) for plan in plans for s in plan.segments
        }
        self._left = windows
        self._windows = windows
        self._copies: list[tuple[_Piece, Tensor]] = []
        self._pieces = self._cut()
        self._elements = sum(s.flat.numel() for plan in plans for s in plan.segments)
        self._seen = 0

    @property
    def done(self) -> bool:
        """Whether the motion of every chunk is known."""
        return self._left < 0

    @property
    def device_bytes(self) -> int:
        """Bytes of the copies that are held now."""
        return sum(copy.numel() * copy.element_size() for _, copy in self._copies)

    @np.errstate(all="ignore")  # the meter reports parameters that are not finite
    def step(self) -> None:
        """At the beginning of every window: compare the last share, and copy the next."""
        for plan in self._plans:
            plan.refresh()
        for piece, before in self._copies:
            self._compare(piece, before)
        self._copies = []
        self._left -= 1
        end = self._elements * (self._windows - max(self._left, 0)) // self._windows
        while self._left >= 0 and self._seen < end:
            piece = next(self._pieces)
            part = piece.flat[piece.starts[0] : piece.starts[-1]]
            with needing(part.numel(), part.dtype, part.device, _ADVICE):
                copy = part.clone()
            self._copies.append((piece, copy))
            self._seen += copy.numel()

    def _cut(self) -> Iterator[_Piece]:
        for plan in self._plans:
            for segment in plan.segments:
                of_chunk = self.motion[segment.name]
                starts = chunk_starts(segment.flat.numel()).tolist()
                step = _SLICE // 1024
                for c in range(0, len(starts) - 1, step):
                    part = slice(c, c + step)
                    yield _Piece(segment.flat, starts[c : c + step + 1], of_chunk[part])

    @staticmethod
    def _compare(piece: _Piece, before: Tensor) -> None:
        begin, end = piece.starts[0], piece.starts[-1]
        wide = torch.float64 if before.dtype == torch.float64 else torch.float32
        moved = piece.flat[begin:end].to(wide) - before.to(wide)
        moved = torch.nn.functional.pad(moved, (0, -len(moved) % UNIT))
        of_unit = moved.view(-1, UNIT).square_().sum(dim=1).double().cpu().numpy()
        first = (np.array(piece.starts[:-1]) - begin) // UNIT
        sums = np.add.reduceat(of_unit, first)
        # float32, as in checkpoints, whose motion must draw the same sample again; their sum over
        # all chunks of a model stays far from overflow.
        sums = np.minimum(np.nan_to_num(sums, nan=0.0), _LARGEST)
        piece.motion[:] = sums.astype(np.float32)
