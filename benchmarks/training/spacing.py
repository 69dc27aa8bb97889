"""How often the average over a run has to be moved: several averages of the same trajectory.

    python benchmarks/training/spacing.py [--task digits quadratic bytes] [--seeds 3] [--steps N]

The average does not touch the training, so that differences between two spacings are paired
exactly. ``d / t`` is the least part of the time so far between two updates; 1/512 takes every
reading of ``AnytimeAutoDrop``.
"""

from __future__ import annotations

import argparse
import collections
import math
import pathlib
import statistics
import sys

import torch
from torch import Generator

from autodrop_ext.average import ParameterAverage

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from training.lengths import make_schedule
from training.studies import STUDIES

PARTS = (512, 128, 64, 32)  # of the time, between two updates
READ_AT = (300, 1_000, 3_000, 10_000)


def train(task_name: str, rate: float, seed: int, steps: int) -> dict[tuple[int, int], float]:
    """Train once, and return the quality of each average by its spacing and length."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = STUDIES[task_name].make()
    model = task.model()
    random = Generator().manual_seed(seed)
    optimizer, scheduler = make_schedule(task_name, "anytime", model, rate, steps, warm_up=0)
    averages = {n: ParameterAverage(lambda: list(model.named_parameters())) for n in PARTS}
    found = {}
    for step in range(1, steps + 1):
        loss = task.loss(model, random)
        if not math.isfinite(loss.item()):
            return {}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        for part, average in averages.items():
            since = step - average.steps
            if scheduler.meter.has_read and part * since >= step:
                average.update(since)
        if step in READ_AT or step == steps:
            for part, average in averages.items():
                with average.swapped():
                    found[part, step] = task.quality(model)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--task", nargs="+", default=["digits", "quadratic", "bytes"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    print(
        "| task | rate | steps | every 1/512 | difference of "
        + " | ".join(f"1/{n}" for n in PARTS[1:])
        + " |"
    )
    print("|:--|--:|--:|--:|" + "--:|" * (len(PARTS) - 1))
    for name in options.task:
        study = STUDIES[name]
        steps = options.steps or min(10_000, max(study.lengths_at(1.0)))
        for multiple in (1.0, 2.0, 4.0):
            runs = [train(name, multiple * study.good, s, steps) for s in range(options.seeds)]
            if not all(runs):
                print(f"| {name} | {multiple * study.good:g} | diverges |", flush=True)
                continue
            rows: dict[int, dict[int, list[float]]] = collections.defaultdict(dict)
            for part, step in runs[0]:
                rows[step][part] = [run[part, step] for run in runs]
            for step, of_part in sorted(rows.items()):
                usual = of_part[PARTS[0]]
                cells = []
                for part in PARTS[1:]:
                    differences = [x - y for x, y in zip(of_part[part], usual, strict=True)]
                    error = statistics.stdev(differences) / len(differences) ** 0.5
                    cells.append(f"{statistics.mean(differences):+.4f} ± {error:.4f}")
                mean = statistics.mean(usual)
                rate = f"{multiple * study.good:g}"
                print(
                    f"| {name} | {rate} | {step:,} | {mean:.4f} | {' | '.join(cells)} |", flush=True
                )


if __name__ == "__main__":
    main()
