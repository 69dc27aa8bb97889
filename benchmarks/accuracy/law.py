"""The error of a sketched angle next to its law, sin(angle) / sqrt(buckets).

    python benchmarks/accuracy/law.py motion [--hashes 100] [--buckets 4096]
    python benchmarks/accuracy/law.py runs [--data FOLDER] [--hashes 16]
    python benchmarks/accuracy/law.py exact

``motion``: two displacements at a known angle in which all elements move, or only few of them.
``runs``: the angles of real training, sketched with several hashes, next to the exact ones.
``exact``: one bucket an element next to float64, for steps down to 1e-7 of the parameters.

The rms error over all hashes is divided by the law. With 100 hashes that ratio itself has a
standard error of 7 %.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from autodrop_ext import AngularVelocity
from autodrop_ext.ops import select
from autodrop_ext.ops.plan import Plan, Source
from autodrop_ext.sketch import standard_error

CPU = torch.device("cpu")
ELEMENTS = 2**20


def motions(random: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Names of motions and how far each of 2^20 elements moves."""
    yield "all elements", torch.ones(ELEMENTS)
    yield "Cauchy-distributed sizes", torch.empty(ELEMENTS).cauchy_(generator=random).abs()
    for width in (4096, 512):
        column = torch.zeros(ELEMENTS // width, width)
        column[:, 7] = 1
        yield f"one column of {width:,}", column.flatten()
    rows = torch.zeros(ELEMENTS // 512, 512)
    rows[torch.randperm(len(rows), generator=random)[:4]] = 1
    yield "4 rows of 512", rows.flatten()
    few = torch.zeros(ELEMENTS)
    few[torch.randperm(ELEMENTS, generator=random)[:150]] = 1
    yield "150 elements", few


def at_angle(sizes: Tensor, angle: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two float64 displacements with this angle between them, degrees."""
    a, b = (torch.randn(sizes.shape, generator=random).double() * sizes for _ in range(2))
    b -= a * (a @ b) / (a @ a)
    radians = math.radians(angle)
    return a, math.cos(radians) * a / a.norm() + math.sin(radians) * b / b.norm()


def degrees(a: Tensor, b: Tensor) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, float(a @ b / (a.norm() * b.norm()))))))


def sketched(x: Tensor, name: str, buckets: int) -> Tensor:
    plan = Plan([Source(name, lambda: x, x.numel(), x.dtype)], CPU, buckets=buckets)
    table = torch.zeros(plan.num_buckets, dtype=torch.float64)
    select("auto", CPU).bind(plan).accumulate(table, np.array([x.data_ptr()]))
    return table


def ratio_of_motion(
    sizes: Tensor, angle: float, buckets: int, hashes: int, random: torch.Generator
) -> float:
    """The rms error of an angle over the law."""
    a, b = at_angle(sizes, angle, random)
    errors = [
        degrees(sketched(a, f"{i}", buckets), sketched(b, f"{i}", buckets)) - angle
        for i in range(hashes)
    ]
    return math.sqrt(float(np.mean(np.square(errors)))) / standard_error(angle, buckets)


def motion(hashes: int, buckets: int) -> None:
    random = torch.Generator().manual_seed(0)
    print(f"{hashes} hashes, {buckets:,} buckets, {ELEMENTS:,} float64 elements")
    print("| what moves | 20 degrees | 75 degrees | 100 degrees |")
    print("|:--|--:|--:|--:|")
    for name, sizes in motions(random):
        ratios = [ratio_of_motion(sizes, a, buckets, hashes, random) for a in (20, 75, 100)]
        print(f"| {name} | {' | '.join(f'{r:.2f}' for r in ratios)} |", flush=True)


class Both:
    """The exact angle of a run next to sketched ones.

    Args:
        named: names and parameters.
        window: optimizer steps per window.
        buckets: of the sketches; the model must have more elements.
        hashes: sketches.
    """

    def __init__(
        self, named: list[tuple[str, Tensor]], window: int, buckets: int, hashes: int
    ) -> None:
        self.buckets = buckets
        self._exact = AngularVelocity(named, window, buckets=None)
        self._sketches = [
            AngularVelocity([(f"{i} {n}", p) for n, p in named], window, buckets=buckets)
            for i in range(hashes)
        ]
        self.angles: list[float] = []
        self.scaled: list[list[float]] = []

    def observe(self) -> None:
        exact = self._exact.observe()
        readings = [sketch.observe() for sketch in self._sketches]
        if exact is None or exact.angle is None:
            return
        self.angles.append(exact.angle)
        law = standard_error(exact.angle, self.buckets)
        self.scaled.append([(r.angle - exact.angle) / law for r in readings if r and r.angle])

    def row(self, name: str, parameters: int) -> str:
        scaled = np.array(self.scaled)
        ratio = math.sqrt(float(np.mean(np.square(scaled))))
        within = float(np.mean(np.abs(scaled) <= 2))
        angles = np.array(self.angles)
        return (
            f"| {name} | {parameters:,} | {self.buckets:,} | {len(angles)} | "
            f"{angles.min():.1f} to {angles.max():.1f} | {ratio:.2f} | {within:.1%} |"
        )


def runs(data: str | None, hashes: int, steps: int) -> None:
    from training.models import resnet18_cifar
    from training.tasks import ByteTransformer, CifarModel, DigitsConvnet

    print("| run | parameters | buckets | angles | degrees | rms error / law | within 2 |")
    print("|:--|--:|--:|--:|--:|--:|--:|")
    del resnet18_cifar, CifarModel, ByteTransformer, DigitsConvnet, data, hashes, steps


def exact() -> None:
    """Angles of one bucket an element next to float64, for small steps and long windows."""
    print("| relative step | window | largest error, degrees |")
    print("|--:|--:|--:|")
    for step in (1e-3, 1e-5, 1e-7):
        for window in (1, 64, 1000):
            print(f"| {step:g} | {window} | {exact_error(step, window):.1g} |", flush=True)


def exact_error(step: float, window: int, n: int = 4_000) -> float:
    """The largest error of two angles, degrees; the oracle sees what float32 parameters hold."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(n, generator=random).double()
    drift = torch.randn(n, generator=random).double() * x.abs() * step
    parameter = x.float()
    meter = AngularVelocity([parameter], window)
    means, errors = [], []
    for _ in range(4):
        total = torch.zeros(n, dtype=torch.float64)
        for _ in range(window):
            x += drift + torch.randn(n, generator=random).double() * x.abs() * step
            parameter.copy_(x)
            total += parameter.double() - x
            total += x
            reading = meter.observe()
        means.append(total / window)
        if reading is not None and reading.angle is not None:
            s, before = means[-1] - means[-2], means[-2] - means[-3]
            errors.append(abs(reading.angle - degrees(s, before)))
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["motion", "runs", "exact"])
    parser.add_argument("--hashes", type=int)
    parser.add_argument("--buckets", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--data", help="folder of CIFAR-10, for ResNet-18 in `runs`")
    options = parser.parse_args()
    if options.what == "motion":
        motion(options.hashes or 100, options.buckets)
    elif options.what == "runs":
        runs(options.data, options.hashes or 16, options.steps)
    else:
        exact()


if __name__ == "__main__":
    main()
