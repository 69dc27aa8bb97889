"""Which chunks of the parameters a sampled meter reads.

Every tensor is a set of strata, and of each stratum's chunks a simple random sample is drawn.
Chunks are sorted into strata by how far they move (``survey.py``), as ``docs/scaling.md`` explains:
few chunks often make most of a displacement, and where they are missed, both the angle and its
standard error are wrong. Where no motion is known, a tensor is one stratum.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

CHUNK_ELEMENTS = 1_024
"""Most elements of a sampled chunk: 4 KiB of float32, a page, are read at a stretch."""

LEAST_CHUNKS = 2
"""Chunks that are read of every tensor that has as many: one alone would not show its scatter."""

PER_STRATUM = 2
"""Chunks that are drawn of a stratum. More would show its scatter better, but strata would be fewer
and wider; measured, two had the smallest errors and the best coverage with Student's t."""

UNIFORM = 0.5
"""Part of the sample that is spread evenly, whatever moved: what did not move during the survey may
move later."""

UNIT = 32  # elements; chunks start at multiples, so that arenas stay aligned to 128 bytes


@dataclass(frozen=True)
class Sample:
    """A seeded part of all chunks.

    Attributes:
        fraction: part of the chunks, in (0, 1].
        seed: the same seed, shards and motion give the same sample.
    """

    fraction: float
    seed: int = 0


@dataclass(frozen=True)
class DrawnChunks:
    """The chunks that are read, tensor after tensor, and the strata that they were drawn from.

    Attributes:
        tensor: which tensor a chunk belongs to, ``[num_chunks]``, ascending.
        index: its position among all chunks of the tensor, ``[num_chunks]``.
        start: its first element within the tensor, ``[num_chunks]``.
        length: elements, ``[num_chunks]``.
        stratum: ``[num_chunks]``, ascending.
        stratum_tensor: tensor of each stratum, ``[num_strata]``.
        population: chunks that a stratum has, ``[num_strata]``.
        taken: how many of them are read, ``[num_strata]``.
    """

    tensor: IntArray
    index: IntArray
    start: IntArray
    length: IntArray
    stratum: IntArray
    stratum_tensor: IntArray
    population: IntArray
    taken: IntArray

    @functools.cached_property
    def expansion(self) -> FloatArray:
        """How many chunks of its stratum each chunk stands for, ``[num_chunks]``."""
        expansion: FloatArray = (self.population / self.taken)[self.stratum]
        return expansion

    @property
    def digest(self) -> str:
        """A hash of which chunks they are."""
        return hashlib.sha256(self.tensor.tobytes() + self.start.tobytes()).hexdigest()


def num_chunks(elements: int) -> int:
    """Number of chunks that a tensor is cut into."""
    return -(-elements // CHUNK_ELEMENTS)


def chunk_starts(elements: int) -> IntArray:
    """Cut a tensor into chunks of nearly equal length; the first elements, then the end.

    At most 1,024 elements each, in whole units of 32 but for the last unit, so that no chunk is
    much shorter than the others and each can stand for any other.
    """
    count = num_chunks(elements)
    units = -(-elements // UNIT)
    if count == 0:
        return np.zeros(1, np.int64)
    starts: IntArray = np.arange(count + 1, dtype=np.int64) * units // count * np.int64(UNIT)
    starts[-1] = elements
    return starts


def draw(
    lengths: Sequence[int],
    labels: Sequence[str],
    sample: Sample,
    motion: Sequence[FloatArray] | None = None,
) -> DrawnChunks:
    """Draw chunks of every tensor without replacement.

    Args:
        lengths: elements of each tensor, 0 allowed.
        labels: what tells the tensors apart: name, shape and which part of it is on this rank.
        sample: how many, and the seed.
        motion: of each tensor, how far each chunk moves (``|s|^2``); None if that is not known.
    """
    starts = [chunk_starts(elements) for elements in lengths]
    counts = np.array([len(s) - 1 for s in starts], np.int64)
    if motion is not None and not any(float(moved.sum()) > 0 for moved in motion):
        motion = None
    taken = _allocate(counts, sample.fraction, motion)
    tensor, index, start, length, stratum = [], [], [], [], []
    owner, population, drawn = [], [], []
    strata = 0
    for t in np.flatnonzero(counts).tolist():
        of_chunk, per_stratum = _strata(
            int(counts[t]), int(taken[t]), None if motion is None else motion[t]
        )
        chosen, at = _draw(of_chunk, per_stratum, f"{sample.seed}|{labels[t]}")
        tensor.append(np.full(len(chosen), t))
        index.append(chosen)
        start.append(starts[t][chosen])
        length.append(starts[t][chosen + 1] - starts[t][chosen])
        stratum.append(at + strata)
        owner.append(np.full(len(per_stratum), t))
        population.append(np.bincount(of_chunk, minlength=len(per_stratum)))
        drawn.append(per_stratum)
        strata += len(per_stratum)
    columns = (tensor, index, start, length, stratum, owner, population, drawn)
    return DrawnChunks(*map(_joined, columns))


def _allocate(counts: IntArray, fraction: float, motion: Sequence[FloatArray] | None) -> IntArray:
    """Chunks to read of each tensor: by its number of chunks, and by its share of the motion."""
    wanted = fraction * counts
    if motion is not None:
        of_tensor = np.array([float(moved.sum()) for moved in motion])
        shared = fraction * counts.sum() * of_tensor / of_tensor.sum()
        wanted = UNIFORM * wanted + (1 - UNIFORM) * shared
    # Where a tensor has fewer chunks than it should give, the others give more.
    budget = min(float(wanted.sum()), float(counts.sum()))
    for _ in range(8):
        given = float(np.minimum(wanted, counts).sum())
        wanted = wanted * (budget / max(given, 1e-300))
    rounded = np.floor(wanted + 0.5).astype(np.int64)
    taken: IntArray = np.minimum(counts, np.maximum(rounded, LEAST_CHUNKS))
    return taken


def _strata(count: int, taken: int, motion: FloatArray | None) -> tuple[IntArray, IntArray]:
    """The stratum of each chunk of a tensor, and how many chunks to draw of each stratum.

    Chunks whose share of the motion asks for certainty are read for certain. The others are sorted
    and cut where their measures, half size and half count, add up to equal sums.
    """
    if motion is None or taken == count or taken < 2 * PER_STRATUM:
        return np.zeros(count, np.int64), np.array([taken], np.int64)
    total = float(motion.sum())
    measure = np.full(count, 1 / count)
    if total > 0:
        measure = UNIFORM * measure + (1 - UNIFORM) * motion / total
    order = np.argsort(-measure, kind="stable")
    measure = measure[order]
    tail = np.cumsum(measure[::-1])[::-1]
    head = np.arange(taken - PER_STRATUM)
    certain = measure[head] * (taken - head) >= tail[head]
    sure = len(head) if certain.all() else int(np.argmin(certain))
    rest, left = count - sure, taken - sure
    strata = max(1, left // PER_STRATUM)
    sums = np.cumsum(measure[sure:])
    edges = np.searchsorted(sums, sums[-1] * np.arange(1, strata) / strata)
    # Every stratum has at least the chunks that are drawn of it.
    h = PER_STRATUM * np.arange(1, strata)
    edges = np.maximum.accumulate(np.maximum(edges, h) - h) + h
    edges = np.minimum(edges, rest - left + h)
    of_sorted = np.zeros(count, np.int64)
    of_sorted[sure:] = np.searchsorted(edges, np.arange(rest), side="right") + (sure > 0)
    drawn = np.full(strata, PER_STRATUM)
    drawn[-1] += left - PER_STRATUM * strata
    of_chunk = np.empty(count, np.int64)
    of_chunk[order] = of_sorted
    return of_chunk, np.concatenate([np.array([sure] * (sure > 0), np.int64), drawn])


def _draw(of_chunk: IntArray, drawn: IntArray, label: str) -> tuple[IntArray, IntArray]:
    """Chunks, stratum after stratum and ascending in each, and their strata.

    Those with the smallest of one random key each: in one stratum, a larger sample of the same seed
    holds the smaller one. Raw generator words, because only their sequence is the same in all
    versions of numpy.
    """
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "big")
    keys = np.random.PCG64(seed).random_raw(len(of_chunk))
    order = np.lexsort((keys, of_chunk))
    stratum = of_chunk[order]
    first = np.searchsorted(stratum, np.arange(len(drawn)))
    kept = np.arange(len(order)) - first[stratum] < drawn[stratum]
    chosen, at = order[kept].astype(np.int64), stratum[kept]
    ascending = np.lexsort((chosen, at))
    return chosen[ascending], at[ascending]


def _joined(parts: list[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
