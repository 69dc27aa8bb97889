"""Parameters moved by hand: an optimizer whose steps are given instead of computed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch


class Given(torch.optim.Optimizer):
    """Sets its one parameter to the next of the given iterates at every step."""

    def __init__(self, iterates: np.ndarray, lr: float = 1.0, dtype: torch.dtype = torch.float32):
        self.parameter = torch.nn.Parameter(torch.zeros(iterates.shape[1], dtype=dtype))
        super().__init__([self.parameter], {"lr": lr})
        self._iterates: Iterator[torch.Tensor] = iter(torch.from_numpy(iterates).to(dtype))

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        self.parameter.copy_(next(self._iterates))


def turning(angle_list: list[float], k: int = 1) -> np.ndarray:
    """Iterates [(len + 2) * k, 2] whose windows turn by the given angles, in degrees.

    All iterates of a window are equal, so that its mean is exact.
    """
    heading, at = 0.0, np.zeros(2)
    means = [at.copy()]
    for turn in [0.0, *angle_list]:
        heading += math.radians(turn)
        at = at + np.array([math.cos(heading), math.sin(heading)])
        means.append(at.copy())
    return np.repeat(np.array(means), k, axis=0)


def noisy_walk(steps: int, n: int, seed: int) -> np.ndarray:
    """A drift towards the origin that noise takes over: angles rise, then saturate."""
    random = np.random.default_rng(seed)
    x = random.normal(size=n) * 3
    iterates = []
    for _ in range(steps):
        x = x - 0.02 * x + 0.05 * random.normal(size=n)
        iterates.append(x)
    return np.array(iterates)


def process(kind: str, steps: int, n: int = 300, seed: int = 0) -> np.ndarray:
    """Parameters that move without any loss, float64 ``[steps, n]``."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(steps, n))
    if kind == "drift":
        return np.cumsum(0.1 * noise + random.normal(size=n), axis=0)
    if kind == "walk":
        return np.cumsum(0.1 * noise, axis=0)
    x, iterates = np.zeros(n), np.empty((steps, n))
    for t in range(steps):
        x = 0.99 * x + 0.1 * noise[t]
        iterates[t] = x
    return iterates
