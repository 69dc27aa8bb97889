"""Whether the scatter of a sample can be trusted, or motion wanders between few chunks.

The standard error of a sample comes from the scatter of the chunks that were read. Where only a few
rows of an embedding move in a window, and other rows in the next, a sample may miss all that moves:
there is then no scatter, and the error looks small because the angle is wrong. The scatter of such
a window cannot say so. The survey can: it has found how few chunks make the motion of a tensor, and
the chunks that are read show whether the same ones go on to move.

For a tensor of ``N`` chunks with surveyed motions ``u``:

* ``(sum u)^2 / (N sum u^2)`` is the part of its chunks that effectively moves (as Kish counts
  unequal weights). If chunks moved at random, strata of ``N_h`` chunks of which ``n_h`` are read
  would estimate the tensor's norm with the relative variance

      r = (1 / part - 1) sum N_h (N_h - n_h) / n_h / N^2

* motion wanders to the degree ``d`` to which the sampled chunks' shares of the surveyed motion
  differ from their shares of this window's motion: half the sum of the absolute differences, from
  0, where the same chunks move as far as before, to 1, where entirely others do.

So wandering gives the norm of a model with surveyed motions ``U`` the relative variance ``sum V /
(sum U)^2`` with ``V = (U d)^2 r``, to which each tensor contributes with ``1 / r`` effective
movers, and all of them together with ``(sum V)^2 / sum V^2 r`` (Satterthwaite).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .draw import DrawnChunks, FloatArray


class Wandering:
    """How far motion wanders between the chunks of some tensors since the survey.

    Args:
        drawn: the chunks that are read.
        motion: what the survey found, for each tensor: zeros where it found none.
    """

    def __init__(self, drawn: DrawnChunks, motion: Sequence[FloatArray]) -> None:
        self._drawn = drawn
        tensors = len(motion)
        N, n = drawn.population.astype(np.float64), drawn.taken.astype(np.float64)
        expanded = np.bincount(drawn.stratum_tensor, N * (N - n) / n, tensors)
        self._unread = np.bincount(drawn.stratum_tensor, N - n, tensors)
        self._surveyed = np.zeros(tensors)
        self._variance = np.zeros(tensors)
        before = np.zeros(len(drawn.tensor))
        for t, moved in enumerate(motion):
            total, count = float(moved.sum()), len(moved)
            if total > 0:
                part = total**2 / (count * float((moved**2).sum()))
                self._surveyed[t] = total
                self._variance[t] = (1 / part - 1) * expanded[t] / count**2
                of_tensor = drawn.tensor == t
                before[of_tensor] = moved[drawn.index[of_tensor]]
        self._before = self._shares(before)

    def _shares(self, values: FloatArray) -> FloatArray:
        """Share of each chunk, expanded, in its tensor; 0 where nothing in it moved."""
        expanded = values * self._drawn.expansion
        totals = np.bincount(self._drawn.tensor, expanded, len(self._surveyed))
        of_chunk = totals[self._drawn.tensor]
        return np.divide(expanded, of_chunk, out=np.zeros_like(expanded), where=of_chunk != 0)

    @np.errstate(all="ignore")  # the meter reports parameters that are not finite
    def table(self, rows: FloatArray) -> FloatArray:
        """For each tensor: chunks that are not read, ``U``, ``V`` and ``V^2 r``; ``[tensors, 4]``.

        They are added up over tensors, devices and ranks, and ``angle.movers`` judges them.

        Args:
            rows: sums of each chunk, ``[num_chunks, 3 or more]``.
        """
        tensors = len(self._surveyed)
        degree = np.zeros(tensors)
        for column in (1, 2):
            common = np.minimum(self._before, self._shares(rows[:, column]))
            degree = np.maximum(degree, 1 - np.bincount(self._drawn.tensor, common, tensors))
        V = (self._surveyed * degree) ** 2 * self._variance
        return np.stack([self._unread, self._surveyed, V, V**2 * self._variance], axis=1)
