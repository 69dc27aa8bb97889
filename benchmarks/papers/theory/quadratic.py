"""The noisy quadratic model (UAI 2024, Section 3; 2021, Section 3), many runs at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodrop_ext.checks import count, number

_DIM = 200
# Iterations whose noise is drawn at once. Always whole, so that a longer run begins like a shorter.
_CHUNK = 64


@dataclass(frozen=True)
class Limits:
    """Where a run at a constant rate settles (UAI 2024, Theorem 3.2; 2021, Theorem 1).

    Attributes:
        inner_product: ``I* = lim E<s_t, s_{t+1}>``, equations (4) and (18).
        squared_norm: ``N* = lim E|s_t|^2``, equation (20).
        cosine: ``C* = I* / N*``, equation (23).
        angle: ``arccos C*``, degrees.
        loss: ``lim E L(x_t) - L(x*)``, from equation (13).
    """

    inner_product: float
    squared_norm: float
    cosine: float
    angle: float
    loss: float


@dataclass(frozen=True)
class AutomaticDrop:
    """The papers' simple rule for this model (last paragraph of Section 3 in both).

    A rate is multiplied by ``factor`` where the angular velocity, averaged over the last
    ``average`` iterations, changes by less than ``threshold`` from one iteration to the next. The
    papers do not say what the average holds after a drop; here it starts again, as the buffer of
    Algorithm 1 does, so that drops are at least ``average + 1`` angles apart.

    In one run the angle scatters by about five degrees, so that its average over 20 iterations
    changes by 0.4 degrees each time, saturated or not. A change below 0.01 is then a matter of
    chance, about one iteration in 50: most drops of this rule say little about saturation.

    Args:
        factor: what a drop multiplies the rate by.
        min_lr: lowest rate.
        threshold: degrees per iteration.
        average: iterations.
    """

    factor: float = 0.5
    min_lr: float = 0.001
    threshold: float = 0.01
    average: int = 20

    def __post_init__(self) -> None:
        number("factor", self.factor, "a number between 0 and 1", lambda x: 0 < x < 1)
        number("min_lr", self.min_lr, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
        number("threshold", self.threshold)
        count("average", self.average, 1)


@dataclass(frozen=True)
class Trajectory:
    """What :meth:`NoisyQuadratic.run` returns; float64, one row per seed, ``T`` iterations.

    Attributes:
        loss: ``[runs, T + 1]``, ``L(x_t) - L(x*) = x_t' A x_t / 2`` without the noise of ``c``. The
            expectation of the printed loss (3) over ``c`` is this plus ``sum(a sigma^2) / 2``.
        lr: ``[runs, T]``, rate of the step from ``x_t`` to ``x_{t+1}``.
        squared_norm: ``[runs, T]``, ``|s_t|^2``.
        inner_product: ``[runs, T - 1]``, ``<s_t, s_{t+1}>``.
        angle: ``[runs, T - 1]``, degrees, between the same; NaN where a step is zero.
    """

    loss: Tensor
    lr: Tensor
    squared_norm: Tensor
    inner_product: Tensor
    angle: Tensor

    def smoothed_angle(self, average: int = 20) -> Tensor:
        """Mean of the last ``average`` angles, ``[runs, T - average]``; as in the papers' figures.

        Raises:
            ValueError: there are fewer angles than that.
        """
        count("average", average, 1)
        if average > self.angle.shape[1]:
            raise ValueError(
                f"average: expected at most {self.angle.shape[1]}, the angles of this run, "
                f"got {average}"
            )
        return self.angle.unfold(1, average, 1).mean(dim=2)


class NoisyQuadratic:
    """``L(x) = (x - c)' A (x - c) / 2`` with ``c ~ N(0, Sigma)``, equation (3); A, Sigma diagonal.

    The gradient at ``x`` is ``A (x - c)``, with new noise at every iteration. The papers take
    ``x`` in R^200 and ``A = diag(0.1, 0.2, ..., 20)``, which are the defaults. They give neither
    ``Sigma`` nor ``x_0``. Here ``sigma`` is 1 and ``x_0`` is 10 in every coordinate: far enough
    from the noise for the angle to rise from the small values of a straight descent.

    Args:
        eigenvalues: ``a_i``, ``[dim]``, all positive; the papers' by default.
        sigma: standard deviation of ``c_i``, one number or ``[dim]``.
        initial: ``x_0``, one number or ``[dim]``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message gives it, what was expected and
            what came.
    """

    def __init__(
        self,
        eigenvalues: Tensor | Sequence[float] | None = None,
        sigma: Tensor | Sequence[float] | float = 1.0,
        initial: Tensor | Sequence[float] | float = 10.0,
    ) -> None:
        if eigenvalues is None:
            eigenvalues = torch.arange(1, _DIM + 1, dtype=torch.float64) / 10
        self.eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
        if self.eigenvalues.dim() != 1 or not len(self.eigenvalues):
            raise ValueError(
                f"eigenvalues: expected shape [dim], got {list(self.eigenvalues.shape)}"
            )
        _check_all("eigenvalues", self.eigenvalues, "positive", lambda x: x > 0)
        self.sigma = self._vector("sigma", sigma)
        _check_all("sigma", self.sigma, "at least 0", lambda x: x >= 0)
        self.initial = self._vector("initial", initial)
        _check_all("initial", self.initial, "finite", torch.isfinite)

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return len(self.eigenvalues)

    def limits(self, lr: float) -> Limits:
        """Theorem 3.2's limits at a constant rate.

        The cosine is ``-(lr / 2) sum(a^3 s^2 / (2 - lr a)) / sum(a^2 s^2 / (2 - lr a))``. Errors in
        the papers: equation (5) of UAI 2024 lost the 1/2 that its proof (23) and the 2021 paper
        (6) have; (20) prints ``sigma`` without its index. The proof's last line assumes
        ``lr * max(a) < 1``, which the papers' own 0.06 breaks (1.2); the limits hold below 2, but
        the bound of 120 degrees does not follow there, only (6)'s ``-lr max(a) / 2``.

        The cosine is the ratio of two expectations, (21) and (22); the expectation of the ratio
        differs from it by O(1 / dim).

        Args:
            lr: above 0 and with ``lr * max(a) < 2``, where the iteration contracts.

        Raises:
            ValueError: the rate is outside that range, or all noise is zero.
        """
        top = 2 / float(self.eigenvalues.max())
        lr = number("lr", lr, f"above 0 and below 2 / max(a) = {top:g}", lambda x: 0 < x < top)
        a = self.eigenvalues
        weight = a.square() * self.sigma.square() / (2 - lr * a)
        if not float(weight.sum()) > 0:
            raise ValueError("sigma: expected noise in at least one coordinate, got none")
        inner_product = -(lr**3) * float((a * weight).sum())
        squared_norm = 2 * lr**2 * float(weight.sum())
        cosine = inner_product / squared_norm
        return Limits(
            inner_product=inner_product,
            squared_norm=squared_norm,
            cosine=cosine,
            angle=math.degrees(math.acos(cosine)),
            loss=lr * float(weight.sum()) / 2,  # sum of a_i E[x_i^2] / 2, E from (13)
        )

    def run(
        self,
        lr: float,
        iterations: int,
        seeds: Iterable[int] = range(20),
        *,
        drop: AutomaticDrop | None = None,
    ) -> Trajectory:
        """Gradient descent ``x_{t+1} = x_t - lr A (x_t - c_t)``, one run per seed.

        Args:
            lr: rate, or the first one where it drops.
            iterations: ``T``, at least 2.
            seeds: of the noise. A run depends on its own seed alone, and its first iterations do
                not depend on how many follow.
            drop: lower the rate of each run by this rule, on that run's own angle.
        """
        number("lr", lr)
        count("iterations", iterations, 2)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if not generators:
            raise ValueError("seeds: expected at least one, got none")
        runs = len(generators)
        a = self.eigenvalues
        x = self.initial.expand(runs, self.dim)
        rate = torch.full((runs, 1), lr, dtype=torch.float64)
        rule = None if drop is None else _DropRule(drop, runs)
        loss = [_half_quadratic(a, x)]
        lrs: list[Tensor] = []
        squared_norm: list[Tensor] = []
        inner_product: list[Tensor] = []
        angle: list[Tensor] = []
        previous: Tensor | None = None
        for t in range(iterations):
            if t % _CHUNK == 0:
                noise = self._noise(generators)
            step = -rate * a * (x - noise[:, t % _CHUNK])
            x = x + step
            loss.append(_half_quadratic(a, x))
            lrs.append(rate[:, 0])
            squared_norm.append(step.square().sum(dim=1))
            if previous is not None:
                inner_product.append((step * previous).sum(dim=1))
                lengths = squared_norm[-1].sqrt() * squared_norm[-2].sqrt()
                angle.append((inner_product[-1] / lengths).clamp(-1, 1).acos().rad2deg())
                if rule is not None:
                    rate = rule.update(angle[-1], rate)
            previous = step
        return Trajectory(
            loss=torch.stack(loss, dim=1),
            lr=torch.stack(lrs, dim=1),
            squared_norm=torch.stack(squared_norm, dim=1),
            inner_product=torch.stack(inner_product, dim=1),
            angle=torch.stack(angle, dim=1),
        )

    def _noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """``c_t`` of the next iterations, ``[runs, _CHUNK, dim]``."""
        draws = [
            torch.randn(_CHUNK, self.dim, dtype=torch.float64, generator=g) for g in generators
        ]
        return torch.stack(draws) * self.sigma

    def _vector(self, name: str, value: Any) -> Tensor:
        vector = torch.as_tensor(value, dtype=torch.float64)
        if vector.shape not in ((), (self.dim,)):
            raise ValueError(
                f"{name}: expected one number or {self.dim}, one per eigenvalue, got shape "
                f"{list(vector.shape)}"
            )
        return vector.expand(self.dim).clone()


class _DropRule:
    """:class:`AutomaticDrop` on many runs: the change of a moving average is (newest - oldest) / n.

    So that only the last ``n`` angles since each run's last drop are kept, in a ring.
    """

    def __init__(self, settings: AutomaticDrop, runs: int) -> None:
        self.settings = settings
        self._rows = torch.arange(runs)
        self._ring = torch.zeros(runs, settings.average, dtype=torch.float64)
        self._seen = torch.zeros(runs, dtype=torch.int64)  # angles since the last drop

    def update(self, angle: Tensor, rate: Tensor) -> Tensor:
        """Rates ``[runs, 1]`` for the next iteration."""
        n = self.settings.average
        place = (self._rows, self._seen % n)
        change = (angle - self._ring[place]) / n
        self._ring[place] = angle
        self._seen += 1
        lowest = self.settings.min_lr
        # A NaN, of a zero step, compares false: an undefined angle decides nothing.
        drops = (change.abs() < self.settings.threshold) & (self._seen > n) & (rate[:, 0] > lowest)
        self._seen[drops] = 0
        lower = (self.settings.factor * rate).clamp(min=lowest)
        return torch.where(drops[:, None], lower, rate)


def _half_quadratic(a: Tensor, x: Tensor) -> Tensor:
    return x.square() @ a / 2


def _check_all(
    name: str, values: Tensor, expected: str, accepted: Callable[[Tensor], Tensor]
) -> None:
    good = accepted(values) & torch.isfinite(values)
    if not bool(good.all()):
        i = int((~good).nonzero()[0])
        raise ValueError(f"{name}: expected every value {expected}, got {values[i]} at {i}")
