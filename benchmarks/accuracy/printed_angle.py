"""Measure the angle that Algorithm 1 of UAI 2024 prints: between two means, not displacements.

    python benchmarks/accuracy/printed_angle.py [--rate R] [--window K] [--steps N] [--drop]
    python benchmarks/accuracy/printed_angle.py --cifar10 FOLDER [--subset N] [--batch N]

The demo's network on handwritten digits, or ResNet-18 on CIFAR-10, is trained at a constant rate,
or with --drop at one that Algorithm 1 drops by its printed angle. The table shows, for the window
at each quarter of the run, the printed angle, how far the mean has moved relative to its norm, and
the angle between the displacements. Below it stand the windows in which the condition of
Algorithm 1 was met.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parameters_to_vector

from autodrop_ext.schedulers.saturation import SaturationDetector, Seen

# Run as a file, these folders are not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.digits import Digits


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees, of float64 vectors; also of nearly parallel ones."""
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


def digits(options: argparse.Namespace) -> tuple[nn.Module, Callable[[], Tensor], float]:
    """The demo's network, what gives the next batch's loss, and the weight decay."""
    task = Digits()
    torch.manual_seed(options.seed)
    model = task.model()
    random = Generator().manual_seed(options.seed)
    return model, lambda: task.loss(model, random), 0.0


def resnet18(options: argparse.Namespace) -> tuple[nn.Module, Callable[[], Tensor], float]:
    """ResNet-18 as the papers train it on CIFAR-10, of whose images a part may be taken."""
    from papers.tasks import CifarModel
    from training.tasks import make_task

    task = make_task(
        "cifar10-resnet18",
        data=options.cifar10,
        batch=options.batch,
        subset=options.subset,
    )
    assert isinstance(task, CifarModel)
    torch.manual_seed(options.seed)
    model = task.model()
    random = Generator().manual_seed(options.seed)
    steps = 0

    def loss() -> Tensor:
        nonlocal steps
        if steps % task.steps_per_epoch == 0:
            task.start_epoch(random)
        steps += 1
        return task.loss(model, random)

    return model, loss, task.recipe.weight_decay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rate", type=float, default=0.04)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drop", action="store_true", help="Times 0.95 where the condition is met")
    parser.add_argument("--cifar10", metavar="FOLDER", help="Train ResNet-18 on these images")
    parser.add_argument("--subset", type=int, help="CIFAR-10 images to train on (all of them)")
    parser.add_argument("--batch", type=int, default=128, help="CIFAR-10 images a step")
    options = parser.parse_args()

    model, next_loss, decay = digits(options) if options.cifar10 is None else resnet18(options)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.rate, momentum=0.9, weight_decay=decay
    )
    detector, seen = SaturationDetector(0.1, 10, 10, "value"), Seen()
    means: list[Tensor] = []
    rows: list[tuple[int, float, float, float]] = []
    met: list[int] = []
    for window in range(1, options.steps // options.window + 1):
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(options.window):
            loss = next_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = total + parameters_to_vector(model.parameters()).detach().double()
        means = [*means[-2:], total / options.window]
        if len(means) < 3:
            continue
        before, last, mean = means
        moved = mean - last
        share = float(moved.norm() / last.norm())
        rows.append((window, angle(mean, last), share, angle(moved, last - before)))
        verdict, seen = detector.judge(seen, rows[-1][1])
        if verdict.saturated:
            met.append(window)
            if options.drop:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.95
    print("| window | printed angle | moved by, of its norm | angle of displacements |")
    print("|--:|--:|--:|--:|")
    for part in range(5):
        window, printed, share, displacements = rows[round(part * (len(rows) - 1) / 4)]
        print(f"| {window} | {printed:.3g} | {100 * share:.2g} % | {displacements:.3g} |")
    print(f"\ncondition met in windows {', '.join(map(str, met))}", end="")
    print(f"; last rate {optimizer.param_groups[0]['lr']:.3g}")


if __name__ == "__main__":
    main()
