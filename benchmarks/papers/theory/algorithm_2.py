"""Algorithm 2's drops and the bounds on their gaps (UAI 2024, Section 5.2; 2021, Section 5.2).

In radians and iterations, as the velocity model of ``autodrop_ext.velocity_model``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from autodrop_ext import checks
from autodrop_ext.checks import count, number
from autodrop_ext.velocity_model import VelocityModel


@dataclass(frozen=True)
class Phase:
    """One learning rate of Algorithm 2.

    Attributes:
        index: ``i``.
        lr: ``alpha_i``.
        start: ``t_i``, the iteration that the model counts from.
        gap: ``k_i = t_{i+1} - t_i``, iterations.
    """

    index: int
    lr: float
    start: int
    gap: int


def algorithm_2(model: VelocityModel, tau0: float, rates: Iterable[float]) -> Iterator[Phase]:
    """Where Algorithm 2 drops, from the closed form; a training run plays no part in it.

    As printed, iteration ``t`` updates first and tests afterwards, so that ``alpha_{i+1}`` is used
    from iteration ``t_{i+1} + 1`` on, and ``alpha_0`` for one iteration more than its gap. Equation
    (11) has each rate begin at ``t_i``, one iteration earlier.

    Args:
        model: of the angular velocity.
        tau0: initial threshold, radians per iteration, in (0, 2).
        rates: ``alpha_0``, ``alpha_1``, and so on; may be endless.
    """
    start = 0
    for index, lr in enumerate(rates):
        gap = model.drop_gap(lr, tau0)
        yield Phase(index, lr, start, gap)
        start += gap


def kappa_1(gamma: float) -> float:
    """``(sqrt(pi) - 1) / gamma``: ``k_i >= kappa_1 / alpha_i``, (37) and (38).

    UAI 2024 prints ``sqrt(pi - 1) / gamma`` in Theorem 5.2 itself; its proof and the 2021 paper
    have this one. The larger constant is no lower bound.
    """
    return (math.sqrt(math.pi) - 1) / number("gamma", gamma)


def kappa_2(gamma: float, tau0: float) -> float:
    """``max(sqrt(2 pi / (3 tau0)), sqrt(4 pi / 3)) / gamma``: ``k_i <= kappa_2 / alpha_i``, (38).

    The papers keep only the first term, which is the larger one up to ``tau0 = 1/2``. Up to
    ``tau0 = 2 pi / (3 (sqrt(4 pi / 3) - 1)^2) = 1.912`` the printed constant still bounds the real
    :meth:`VelocityModel.gap_length`, because the proof leaves a term of ``-1 / (gamma lr)`` out;
    only the integer :meth:`VelocityModel.drop_gap`, which is up to 1 longer, can exceed it. Above
    1.912, in what is left of Theorem 5.2's range ``tau0 < 2``, real gaps exceed it too where
    ``epsilon lr`` is close to 1/3. The second term of the proof's own maximum bounds all of them.
    """
    largest = max(2 * math.pi / (3 * checks.tau0("tau0", tau0)), 4 * math.pi / 3)
    return math.sqrt(largest) / number("gamma", gamma)


def gap_bounds(lr: float, gamma: float, tau0: float) -> tuple[float, float]:
    """``(kappa_1 / lr, kappa_2 / lr)``, the bounds on the gap of a rate: (38), Lemma 12.1.

    They hold for the integer :meth:`VelocityModel.drop_gap` too: the proof drops a term of
    ``1 / (gamma lr)``, at least 1, which rounding up stays within.

    Raises:
        ValueError: ``gamma * lr > 1``, where the last step before (38) fails; the papers do not
            state this condition.
    """
    number("lr", lr)
    number("gamma", gamma)
    if gamma * lr > 1:
        raise ValueError(f"gamma: expected at most 1 / lr = {1 / lr:g}, got {gamma!r}")
    return kappa_1(gamma) / lr, kappa_2(gamma, tau0) / lr


def iteration_count_bounds(n: int, kappa1: float, kappa2: float) -> tuple[float, float]:
    """Bounds on ``T``, the sum of the first ``n`` gaps: (36), Lemma 12.1.

    ``kappa n (n + 3) / 2`` for either constant. For the rates ``(i + 2)^(-1)`` of the proof; the
    printed remark that the sum is treated as an integral for large ``n`` is not needed.
    """
    count("n", n, 1)
    _check_kappas(kappa1, kappa2)
    return kappa1 * n * (n + 3) / 2, kappa2 * n * (n + 3) / 2


def drop_count_bounds(iterations: int, kappa1: float, kappa2: float) -> tuple[float, float]:
    """Bounds on ``n``, the number of rates used in ``T`` iterations: (41).

    ``sqrt(2 T / kappa_2) - 3`` and ``sqrt(2 T / kappa_1)``, for the rates of the proof.
    """
    count("iterations", iterations, 1)
    _check_kappas(kappa1, kappa2)
    return math.sqrt(2 * iterations / kappa2) - 3, math.sqrt(2 * iterations / kappa1)


def _check_kappas(kappa1: float, kappa2: float) -> None:
    number("kappa1", kappa1)
    number(
        "kappa2",
        kappa2,
        f"a finite number of at least kappa1 = {kappa1!r}",
        lambda x: kappa1 <= x < math.inf,
    )
