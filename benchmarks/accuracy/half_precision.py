"""The angle of bfloat16 parameters next to that of the float32 weights that they are rounded from.

    python benchmarks/accuracy/half_precision.py [--elements 20000]

Float32 weights of standard deviation 1 travel, walk at random or stay near a place, at steps of a
given rms length in units of ``eps = 1/128``, the largest relative distance of neighbouring bfloat16
numbers. The bfloat16 parameters get the same updates in three ways: with a compensation that keeps
what rounding cut off (Kahan), rounded to the nearest number, or rounded up or down at random.

A row has the angle of the weights, and for each of the three the error of its angle, and in
brackets the length of a step that follows from the displacement of a window, which is what the
meter's warning looks at: ``|s| sqrt(3 k / (2 k^2 + 1)) / (eps |m|)``, exact for a random walk.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from autodrop_ext import AngularVelocity

MOTIONS = ("travel", "walk", "stay")
STEPS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
WINDOWS = (8, 64)
EPS = torch.finfo(torch.bfloat16).eps


class Motion:
    """Updates of one kind, of rms length ``step``."""

    def __init__(self, kind: str, step: float, window: int, elements: int) -> None:
        self.kind, self.step, self.window = kind, step, window
        self.random = torch.Generator().manual_seed(0)
        self.drift, self.place = self.normal(elements), torch.zeros(elements)

    def normal(self, elements: int) -> Tensor:
        """Return independent normal numbers."""
        return torch.randn(elements, generator=self.random)

    def update(self) -> Tensor:
        """Return the next update."""
        noise = self.normal(len(self.place))
        if self.kind == "walk":
            return self.step * noise
        if self.kind == "travel":  # as far by drift as by noise within a quarter of a window
            share = math.sqrt(4 / (4 + self.window))
            return self.step * (share * self.drift + math.sqrt(1 - share**2) * noise)
        pull = 2 / self.window  # back within half a window
        before, self.place = self.place, self.place * (1 - pull) + noise
        return self.step * (self.place - before) / math.sqrt(2 / (2 - pull))


def rounded_at_random(x: Tensor, random: torch.Generator) -> Tensor:
    """Return the bfloat16 neighbours of float32 numbers, the nearer the more often."""
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=random)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def measure(kind: str, step: float, window: int, elements: int) -> list[tuple[float, float]]:
    """Return mean angle and estimated step of the weights and of three kinds of parameters."""
    motion = Motion(kind, step * EPS, window, elements)
    weights = motion.normal(elements)
    halves = [weights.bfloat16() for _ in range(3)]
    kahan, nearest, stochastic = halves
    meters = [AngularVelocity([x], window) for x in (weights, *halves)]
    for _ in range(7 * window):
        update = motion.update()
        weights += update
        kahan.copy_(weights)  # what a compensation keeps is the rest of the float32 weight
        nearest.copy_(nearest.float() + update)
        stochastic.copy_(rounded_at_random(stochastic.float() + update, motion.random))
        for meter in meters:
            meter.observe()
    walk = math.sqrt((2 * window**2 + 1) / (3 * window))
    results = []
    for meter in meters:
        angles = [r.angle for r in meter.history if r.angle is not None]
        norm = sum(r.norm for r in meter.history) / len(meter.history)
        results.append((sum(angles) / len(angles), norm / walk / EPS / float(weights.norm())))
    return results


def main() -> None:
    """Print a row for each motion, window and step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--elements", type=int, default=20_000)
    elements = parser.parse_args().elements
    print("| motion | window | step / eps | angle | Kahan | nearest | stochastic |")
    print("|:--|--:|--:|--:|--:|--:|--:|")
    for kind in MOTIONS:
        for window in WINDOWS:
            for step in STEPS:
                (angle, _), *others = measure(kind, step, window, elements)
                cells = " | ".join(f"{a - angle:+.1f} ({r:.2f})" for a, r in others)
                print(f"| {kind} | {window} | {step:g} | {angle:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
