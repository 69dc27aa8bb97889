"""The error of a sketched angle next to its law, sin(angle) / sqrt(buckets).

    python benchmarks/accuracy/law.py motion [--hashes 100] [--buckets 4096]
    python benchmarks/accuracy/law.py runs [--hashes 16] [--steps 400] [--cifar10 FOLDER]
    python benchmarks/accuracy/law.py exact

``motion``: two displacements at a known angle in which all elements move, or only few of them.
``runs``: the angles of real training, sketched with several hashes, next to the exact ones.
``exact``: one bucket an element next to float64, for steps down to 1e-7 of the parameters.

Every hash puts the same elements into other buckets with other signs. The rms error over all
hashes is divided by the law; with 100 hashes that ratio has a standard error of 7 % itself. What
``motion`` prints in brackets is the ratio that the variance of a count sketch predicts for these
two displacements. It is below 1 if few elements carry most of the motion: an element does not
collide with itself, nor with those of its own chunk. If two or three elements carry it, nearly all
errors are small, and the rms error comes from the few hashes in which they meet: one such hash in
the sample makes the ratio several times what is predicted, none makes it a fraction.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

# Run as a file, these folders are not on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from demo.digits import Digits
from demo.text import Bytes

from autodrop_ext import AngularVelocity
from autodrop_ext.ops import select
from autodrop_ext.ops.plan import LANES, Plan, Source
from autodrop_ext.sketch import standard_error

CPU = torch.device("cpu")
ELEMENTS = 2**20
ANGLES = (20.0, 75.0, 100.0)


def motions(random: Generator, elements: int = ELEMENTS) -> Iterator[tuple[str, Tensor]]:
    """Names of motions and how far each element moves."""
    yield "all elements", torch.ones(elements)
    for draw in range(1, 6):
        sizes = torch.empty(elements).cauchy_(generator=random).abs()
        yield f"Cauchy-distributed sizes, draw {draw}", sizes
    for width in (4096, 512):
        column = torch.zeros(elements // width, width)
        column[:, 7] = 1
        yield f"one column of {width:,}", column.flatten()
    rows = torch.zeros(elements // 512, 512)
    rows[torch.randperm(len(rows), generator=random)[:4]] = 1
    yield "4 rows of 512", rows.flatten()
    few = torch.zeros(elements)
    few[torch.randperm(elements, generator=random)[:150]] = 1
    yield "150 elements", few


def orthogonal(sizes: Tensor, random: Generator) -> tuple[Tensor, Tensor]:
    """Two orthogonal float64 displacements of length 1."""
    a, b = (torch.randn(sizes.shape, generator=random).double() * sizes for _ in range(2))
    a /= a.norm()
    for _ in range(2):  # once leaves 1e-16 over the length of what remains
        b -= a * (a @ b)
        b /= b.norm()
    return a, b


def at_angle(a: Tensor, b: Tensor, angle: float) -> Tensor:
    """What stands at an angle to ``a`` in the plane of ``a`` and ``b``, degrees."""
    radians = math.radians(angle)
    return math.cos(radians) * a + math.sin(radians) * b


def degrees(a: Tensor, b: Tensor) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, float(a @ b / (a.norm() * b.norm()))))))


def sketched(x: Tensor, name: str, buckets: int) -> Tensor:
    """The table of one parameter of this name."""
    plan = Plan([Source(name, lambda: x, x.numel(), x.dtype)], CPU, buckets=buckets)
    table = torch.zeros(plan.num_buckets, dtype=torch.float64)
    select("auto", CPU).bind(plan).accumulate(table, np.array([x.data_ptr()]))
    return table


def scaled_errors(a: Tensor, b: Tensor, buckets: int, hashes: int) -> Tensor:
    """Errors over the law, ``[hashes, angles]``.

    Tables are linear, so that two of them for each hash serve all :data:`ANGLES`.
    """
    errors = torch.empty(hashes, len(ANGLES), dtype=torch.float64)
    for i in range(hashes):
        of_a, of_b = sketched(a, f"{i}", buckets), sketched(b, f"{i}", buckets)
        for j, angle in enumerate(ANGLES):
            error = degrees(of_a, at_angle(of_a, of_b, angle)) - angle
            errors[i, j] = error / standard_error(angle, buckets)
    return errors


def predicted(a: Tensor, b: Tensor, angle: float) -> float:
    """The rms error over the law that follows from the variance of a count sketch, first order.

    With ``u = a``, ``v`` at the angle to it and ``c = cos(angle)``, the cosine of the tables errs
    by ``sum_{i != j} +-[same bucket] M_ij``, where ``M = (u v' + v u' - c (u u' + v v')) / 2``. Its
    variance is ``2 / m`` times the sum of the ``M_ij^2`` whose elements can meet in a bucket: those
    of two chunks. Over all pairs that sum is ``sin(angle)^4 / 2``, and the law follows.
    """
    v, c = at_angle(a, b, angle), math.cos(math.radians(angle))

    def of_chunks(product: Tensor) -> Tensor:
        return torch.nn.functional.pad(product, (0, -len(product) % LANES)).view(-1, LANES).sum(1)

    uu, vv, uv = of_chunks(a * a), of_chunks(v * v), of_chunks(a * v)
    within = (uu * vv + uv**2) / 2 - c * (uu + vv) * uv + c**2 * (uu**2 + vv**2 + 2 * uv**2) / 4
    share = 2 * float(within.sum()) / math.sin(math.radians(angle)) ** 4
    return math.sqrt(max(0.0, 1 - share))


def motion(hashes: int, buckets: int, elements: int = ELEMENTS) -> None:
    random = Generator().manual_seed(0)
    print(f"{hashes} hashes, {buckets:,} buckets, {elements:,} float64 elements")
    print()
    columns = " | ".join(f"{angle:g} degrees" for angle in ANGLES)
    print(f"| what moves | {columns} | within 2 errors |")
    print(f"|:--|{'--:|' * (len(ANGLES) + 1)}")
    for name, sizes in motions(random, elements):
        a, b = orthogonal(sizes, random)
        errors = scaled_errors(a, b, buckets, hashes)
        ratios = errors.square().mean(0).sqrt().tolist()
        cells = [f"{r:.2f} ({predicted(a, b, w):.2f})" for r, w in zip(ratios, ANGLES, strict=True)]
        within = float((errors.abs() <= 2).double().mean())
        print(f"| {name} | {' | '.join(cells)} | {within:.1%} |", flush=True)


class Meters:
    """The exact angle of a run next to sketched ones.

    Args:
        named: names and parameters.
        window, snapshots: of all meters.
        sizes: buckets of the sketches; the model must have more elements.
        hashes: sketches of each size, which differ by the names that they know parameters under.
    """

    def __init__(
        self,
        named: list[tuple[str, Tensor]],
        window: int,
        snapshots: int | None,
        sizes: tuple[int, ...],
        hashes: int,
    ) -> None:
        self._exact = AngularVelocity(named, window, snapshots=snapshots, buckets=None)
        self._sketches = {
            size: [
                AngularVelocity(
                    [(f"{i} {n}", p) for n, p in named], window, snapshots=snapshots, buckets=size
                )
                for i in range(hashes)
            ]
            for size in sizes
        }
        self._angles: list[float] = []
        self._scaled: dict[int, list[float]] = {size: [] for size in sizes}

    def observe(self) -> None:
        exact = self._exact.observe()
        for size, sketches in self._sketches.items():
            readings = [sketch.observe() for sketch in sketches]
            if exact is not None and exact.angle is not None:
                law = standard_error(exact.angle, size)
                of_size = [r.angle for r in readings if r is not None and r.angle is not None]
                self._scaled[size] += [(angle - exact.angle) / law for angle in of_size]
        if exact is not None and exact.angle is not None:
            self._angles.append(exact.angle)

    def rows(self, name: str, parameters: int) -> Iterator[str]:
        low, high = min(self._angles), max(self._angles)
        for size, errors in self._scaled.items():
            ratio = math.sqrt(float(np.mean(np.square(errors))))
            within = float(np.mean(np.abs(errors) <= 2))
            yield (
                f"| {name} | {parameters:,} | {size:,} | {len(self._angles)} "
                f"| {low:.1f} to {high:.1f} | {ratio:.2f} | {within:.1%} |"
            )


class Run:
    """Training of which the angles are measured: a model, and what gives the next batch's loss."""

    def __init__(self, task: Any, rate: float, *, adam: bool = False) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = task.model()
        self._task, self._random, self._step = task, Generator().manual_seed(0), 0
        params = self.model.parameters()
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(params, rate) if adam else torch.optim.SGD(params, rate, momentum=0.9)
        )

    def step(self) -> None:
        per_epoch = getattr(self._task, "steps_per_epoch", None)
        if per_epoch and self._step % per_epoch == 0:
            self._task.start_epoch(self._random)
        self._step += 1
        loss = self._task.loss(self.model, self._random)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


class WideDigits(Digits):
    """The digits network with more elements than the larger sketch has buckets."""

    width = 64


def tasks(cifar10: str | None, batch: int) -> dict[str, Callable[[], Run]]:
    """What makes each run, by name."""

    def resnet18() -> Run:
        from papers.tasks import CifarModel
        from training.tasks import make_task

        task = make_task("cifar10-resnet18", data=cifar10, batch=batch)
        assert isinstance(task, CifarModel)
        return Run(task, 0.05)

    made: dict[str, Callable[[], Run]] = {
        "digits network, 64 wide": lambda: Run(WideDigits(), 0.04),
        "byte transformer": lambda: Run(Bytes(), 0.006, adam=True),
    }
    return made if cifar10 is None else {**made, f"ResNet-18, batches of {batch}": resnet18}


def runs(
    cifar10: str | None,
    hashes: int,
    steps: int,
    *,
    window: int = 4,
    snapshots: int | None = None,
    batch: int = 8,
    only: str = "",
    sizes: tuple[int, ...] = (4_096, 65_536),
) -> None:
    print(f"{hashes} hashes, windows of {window} steps, {steps} steps")
    print()
    print("| run | parameters | buckets | angles | degrees | rms error / law | within 2 errors |")
    print("|:--|--:|--:|--:|--:|--:|--:|")
    for name, make in tasks(cifar10, batch).items():
        if only in name:
            run = make()
            named = list(run.model.named_parameters())
            meters = Meters(named, window, snapshots, sizes, hashes)
            for _ in range(steps):
                run.step()
                meters.observe()
            for row in meters.rows(name, sum(p.numel() for _, p in named)):
                print(row, flush=True)


def exact() -> None:
    """Angles of one bucket an element next to float64, for small steps and long windows."""
    print("| relative step | window | largest error, degrees |")
    print("|--:|--:|--:|")
    for step in (1e-3, 1e-5, 1e-7):
        for window in (1, 64, 1000):
            print(f"| {step:g} | {window} | {exact_error(step, window):.1g} |", flush=True)


def exact_error(step: float, window: int, n: int = 4_000) -> float:
    """The largest error of two angles, degrees, next to float64 displacements of the same values.

    Steps add up in float64; what both sides see is rounded to float32, as parameters are.
    """
    random = Generator().manual_seed(1)
    x = torch.randn(n, generator=random).double()
    drift = torch.randn(n, generator=random).double() * x.abs() * step
    start, parameter = x.clone(), x.float()
    meter = AngularVelocity([parameter], window)
    means, errors = [], []
    for _ in range(4):
        total = torch.zeros(n, dtype=torch.float64)
        for _ in range(window):
            x += drift + torch.randn(n, generator=random).double() * x.abs() * step
            parameter.copy_(x)
            total += parameter.double() - start  # small next to the parameters: rounds less
            reading = meter.observe()
        means.append(total / window)
        if reading is not None and reading.angle is not None:
            s, before = means[-1] - means[-2], means[-2] - means[-3]
            a, b = s / s.norm(), before / before.norm()
            # Not by the arc cosine, whose own error is 1e-6 degrees near 0.
            angle = math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))
            errors.append(abs(reading.angle - angle))
    if len(errors) != 2:
        raise RuntimeError(f"expected 2 angles, got {len(errors)}")
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["motion", "runs", "exact"])
    parser.add_argument("--hashes", type=int)
    parser.add_argument("--buckets", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--snapshots", type=int, help="reads of a window; all of its steps")
    parser.add_argument("--only", default="", help="part of the name of a run")
    parser.add_argument("--batch", type=int, default=8, help="images a step of ResNet-18")
    parser.add_argument("--cifar10", metavar="FOLDER", help="also ResNet-18 on these images")
    options = parser.parse_args()
    if options.what == "motion":
        motion(options.hashes or 100, options.buckets)
    elif options.what == "runs":
        runs(
            options.cifar10,
            options.hashes or 16,
            options.steps,
            window=options.window,
            snapshots=options.snapshots,
            only=options.only,
            batch=options.batch,
        )
    else:
        exact()


if __name__ == "__main__":
    main()
