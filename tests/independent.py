"""AutoDrop once more, in float64 and numpy, written from the paper and sharing no code with us.

UAI 2024, Definition 3.3 and Algorithm 1, with the decisions of the project: displacements of window
means, the filter over values, signed rise, two smoothed values needed after a drop.
"""

from __future__ import annotations

import math

import numpy as np


def angles(iterates: np.ndarray, k: int) -> list[float | None]:
    """Angle per window, degrees; ``iterates`` [steps, n] after each optimizer step."""
    windows = len(iterates) // k
    means = iterates[: windows * k].astype(np.float64).reshape(windows, k, -1).mean(axis=1)
    s = np.diff(means, axis=0)
    result: list[float | None] = []
    for new, old in zip(s[1:], s[:-1], strict=True):
        norms = np.linalg.norm(new) * np.linalg.norm(old)
        result.append(None if norms == 0 else float(np.degrees(np.arccos(new @ old / norms))))
    return result


def schedule(
    angle_list: list[float | None],
    lr: float,
    *,
    rho: float,
    threshold: float = 0.1,
    m: int = 10,
    least: int = 10,
    min_lr: float = 0.0,
    time_kernel: bool = False,
) -> tuple[list[float | None], list[float]]:
    """Smoothed values and learning rates, one per angle."""
    B: list[float] = []
    C: list[float] = []
    smoothed: list[float | None] = []
    lrs = []
    for omega in angle_list:
        if omega is not None:
            B.append(omega)
        value = None
        if omega is not None and len(B) >= least:
            b = np.array(B[-m:])
            sigma = min(b.std(), m / 2)
            distance = np.arange(len(b))[::-1] if time_kernel else b - b[-1]
            with np.errstate(invalid="ignore", divide="ignore"):
                w = np.where(distance == 0, 1.0, np.exp(-(distance**2) / (2 * sigma**2)))
            value = float((w * b).sum() / w.sum())
            C.append(value)
            if len(C) >= 2 and C[-1] - C[-2] < threshold:
                lr = min(lr, max(min_lr, rho * lr))
                B, C = [], []
        smoothed.append(value)
        lrs.append(lr)
    return smoothed, lrs


def critical(k: int, of_many: float = 0.25) -> float:
    """Cosine of a random walk's displacements between means of k readings."""
    # Cov of neighbouring window sums against their variance, summed by hand for unit increments:
    # weights of the increments within two neighbouring windows rise to k and fall again.
    rising = np.arange(1, k + 1)
    first = np.concatenate([rising, k - rising[:-1], np.zeros(k)])[: 3 * k - 1]
    second = np.roll(np.concatenate([first, np.zeros(k)]), k)[: 3 * k - 1]
    return of_many / 0.25 * float(first @ second / (first @ first)) if k > 1 else 0.0


def anytime(
    iterates: np.ndarray,
    window: int = 16,
    windows: int = 8,
    snapshots: int = 32,
    *,
    automatic: bool = False,
) -> list[tuple[int, int, float | None, float | None, float]]:
    """The rule as design and docstring have it: step, window, mean cosine, exponent, rate.

    With ``automatic``, the rate that was set is 1, the windows begin with 2, and the exponent is
    minus that of the rise until it ends.
    """
    lr, position, taken = 1.0, 0, []
    rising = automatic
    if automatic:
        window, lr = 2, 16 / 512
    last = before = mean = None
    cosines: list[float] = []
    fresh, doubled, closes = True, False, []
    for t, x in enumerate(iterates, 1):
        position += 1
        if position % max(1, window // snapshots) == 0:
            taken.append(x)
        if position < window:
            continue
        m, taken, position = np.mean(taken, axis=0), [], 0
        power = None
        if not np.isfinite(m).all():
            closes.append((t, window, mean, power, lr))
            last, before, doubled = None, None, False
            continue
        known = before is not None
        if before is not None:
            s, s_before = m - last, last - before
            cosine = float(s @ s_before / math.sqrt((s @ s) * (s_before @ s_before)))
            if fresh and mean is not None:
                cosines = []
            fresh = False
            cosines = [*cosines, cosine][-8:]
            if mean is not None or len(cosines) >= 4:
                mean = sum(cosines) / len(cosines)
        if mean is not None and (known or doubled):
            null = critical(min(window if known else window // 2, snapshots))
            if not rising:
                power = min(0.5, 5 * max(0.0, null - mean))
                lr *= ((t - window) / t) ** power
            elif t > 16 and mean < null and window >= 8:
                rising = False
            elif t > 16:
                power = -min(1.0, max(0.0, 2 * (mean - null)))
                lr *= (t / (t - window)) ** -power
                lr = 1.0 if lr > 1 - 1e-9 else lr
                rising = lr < 1
        closes.append((t, window, mean, power, lr))
        last, before, doubled = m, last, False
        if t >= 2 * windows * window and before is not None:
            last, before, window = (last + before) / 2, None, 2 * window
            fresh = doubled = True
    return closes
