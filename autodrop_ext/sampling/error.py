"""How far a sampled angle may be off: the scatter of chunks within their strata.

The sums ``D = <s_i, s_{i-1}>``, ``A = |s_i|^2`` and ``B = |s_{i-1}|^2`` are estimated without bias
by expanding each stratum's mean to its number of chunks. With ``n`` of ``N`` chunks read, and ``S``
the covariance matrix of the three sums of a chunk within the stratum, the estimates have the
covariance

    N^2 (1/n - 1/N) S

(simple random sampling without replacement; Cochran, *Sampling Techniques*, 1977, theorems 2.2 and
5.3), which is 0 where all chunks are read. Strata are drawn independently, so theirs add up. The
cosine ``c = D / sqrt(A B)`` then has, to first order (delta method), the variance ``g' V g`` with
``g = (1 / sqrt(A B), -c / 2A, -c / 2B)``.

With two or three chunks a stratum, that variance is itself a rough estimate. Its degrees of freedom
are ``V^2 / sum V_h^2 / (n_h - 1)`` over the strata ``h`` (Satterthwaite), and the interval takes
Student's t with as many. The ``V_h`` depend on the totals of all ranks; since they are linear in
six covariances each, 21 sums of products of those suffice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..angle import PAIRS, gradient, standard_error
from ..ops.window_sums import COVARIANCES
from .draw import DrawnChunks

FloatArray = npt.NDArray[np.float64]

SQUARES = 21
"""Entries of a symmetric matrix over the six covariances."""

_ROW, _COLUMN = (np.array(index) for index in zip(*PAIRS, strict=True))
_UPPER = np.triu_indices(COVARIANCES)

# The meter reports parameters that are not finite. A warning, which may be an error, on one rank
# alone would leave the other ranks waiting.
_quiet = np.errstate(all="ignore")

# The 97.5 % quantile of Student's t over 1/degrees of freedom; straight lines between these points
# are off by less than 2 %.
_INVERSE_FREEDOM = [0.0, 1 / 60, 1 / 30, 1 / 15, 1 / 10, 1 / 7, 1 / 5, 1 / 4, 1 / 3, 0.4, 0.5]
_INVERSE_FREEDOM += [1 / 1.75, 1 / 1.5, 0.8, 0.9, 1.0]
_T95 = [1.9600, 2.0003, 2.0423, 2.1314, 2.2281, 2.3646, 2.5706, 2.7764, 3.1824, 3.5747, 4.3027]
_T95 += [4.9488, 6.0167, 8.0280, 10.0641, 12.7062]


@_quiet
def scatter(rows: FloatArray, drawn: DrawnChunks) -> FloatArray:
    """``S`` of each stratum, unbiased, ``[num_strata, 6]``; 0 for strata of one chunk.

    Args:
        rows: sums of each chunk, ``[num_chunks, 3 or more]``; the first three columns count.
        drawn: the strata.
    """
    if not len(rows):
        return np.zeros((0, COVARIANCES))
    first = np.cumsum(drawn.taken) - drawn.taken
    means = np.add.reduceat(rows[:, :3], first, axis=0) / drawn.taken[:, None]
    off = rows[:, :3] - means[drawn.stratum]
    products = np.add.reduceat(off[:, _ROW] * off[:, _COLUMN], first, axis=0)
    covariances: FloatArray = products / np.maximum(drawn.taken - 1, 1)[:, None]
    return covariances


@_quiet
def variances(scattered: FloatArray, population: npt.ArrayLike, taken: npt.ArrayLike) -> FloatArray:
    """Covariances of each stratum's estimates, ``[num_strata, 6]``.

    Args:
        scattered: from :func:`scatter`, ``[num_strata, 6]``.
        population: chunks of each stratum.
        taken: how many of them are read, or would be.
    """
    N, n = np.asarray(population, np.float64), np.asarray(taken, np.float64)
    expanded: FloatArray = scattered * (N * (N - n) / n)[:, None]
    return expanded


@_quiet
def squares(of_stratum: FloatArray, taken: npt.ArrayLike, weights: FloatArray) -> FloatArray:
    """What degrees of freedom are computed from, ``[21]``.

    Args:
        of_stratum: from :func:`variances`, ``[num_strata, 6]``.
        taken: chunks that are read of each stratum.
        weights: of the strata's sums, ``[num_strata]``.
    """
    scaled = weights / np.maximum(np.asarray(taken, np.float64) - 1, 1)
    products: FloatArray = (of_stratum * scaled[:, None]).T @ of_stratum
    return products[_UPPER]


def margin(
    dot: float,
    norm: float,
    previous_norm: float,
    covariances: Sequence[float],
    products: Sequence[float],
    most_freedom: float = math.inf,
) -> float:
    """Half the width of the 95 % confidence interval of the angle, degrees.

    Args:
        dot: as in :func:`standard_error`, and so the next three.
        norm: see there.
        previous_norm: see there.
        covariances: see there.
        products: from :func:`squares`, 21.
        most_freedom: upper bound of the degrees of freedom.
    """
    error = standard_error(dot, norm, previous_norm, covariances)
    if not error > 0:
        return error
    direction = np.array(gradient(dot, norm, previous_norm))
    matrix = np.zeros((COVARIANCES, COVARIANCES))
    matrix[_UPPER] = products
    matrix = np.triu(matrix) + np.triu(matrix, 1).T
    spread = float(direction @ matrix @ direction)
    variance = float(direction @ np.asarray(covariances))
    # Rounding may leave a nearly empty sum at or below 0.
    freedom = variance**2 / spread if spread > 0 else math.inf
    return error * float(
        np.interp(1 / max(min(freedom, most_freedom), 1.0), _INVERSE_FREEDOM, _T95)
    )
