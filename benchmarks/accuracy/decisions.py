"""What sketched angles change: drops and final quality next to those with exact angles.

    python benchmarks/accuracy/decisions.py [--seeds 4] [--schedule S] [--task T] [--quick]

AutoDrop and AnytimeAutoDrop train the demo's digits network, four times as wide as there so that
it has more elements than any of the sketches has buckets, and its byte transformer. Runs of one
seed start from the same parameters and see the same batches, and part ways with the first decision
that differs. So differences to the run with exact angles are paired over seeds; after ``+-`` stands
their standard error. AnytimeAutoDrop is evaluated with its averaged parameters.

The row "exact, nudged" shows what chance makes of it: its initial rate is higher by a millionth.
Fewer than 4,096 buckets cannot be tried: ``buckets`` is a multiple of 4,096.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import multiprocessing
import pathlib
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Generator

# Run as a file, these folders are not on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from demo.digits import Digits
from demo.text import Bytes

from autodrop_ext import AnytimeAutoDrop, AutoDrop

BUCKETS = (4_096, 16_384, 65_536, None)
NUDGED = -1  # exact angles, and an initial rate that is higher by 1e-6 of itself
SCHEDULES = ("AutoDrop", "AnytimeAutoDrop")
WINDOW = 2  # AutoDrop's: runs of hundreds of steps hold enough drops to compare


class WideDigits(Digits):
    """79,626 parameters."""

    width = 64
    lr = 0.04


class FastBytes(Bytes):
    """The demo's byte transformer at twice its rate."""

    lr = 0.006


class Trained(NamedTuple):
    """How a run ended."""

    drops: int
    rate: float
    quality: float


TASKS = {"digits network, 64 wide": (WideDigits, 600), "byte transformer": (FastBytes, 320)}
"""Task and optimizer steps, by name; the transformer has 279,424 parameters."""


def train(task_name: str, schedule: str, buckets: int | None, seed: int, steps: int) -> Trained:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = TASKS[task_name][0]()
    model = task.model()
    if buckets == NUDGED:
        task.lr *= 1 + 1e-6
        buckets = None
    optimizer, random = task.optimizer(model), Generator().manual_seed(seed)
    scheduler: Any = (
        AutoDrop(optimizer, WINDOW, buckets=buckets)
        if schedule == "AutoDrop"
        else AnytimeAutoDrop(optimizer, buckets=buckets)
    )
    with closing(scheduler):
        for _ in range(steps):
            loss = task.loss(model, random)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        averaged = scheduler.averaged_parameters if scheduler.average else nullcontext
        with averaged():
            quality = task.quality(model)
    return Trained(scheduler.num_drops, float(optimizer.param_groups[0]["lr"]), quality)


def difference(values: Sequence[float], exact: Sequence[float]) -> str:
    """Mean of the paired differences, and its standard error."""
    pairs = [a - b for a, b in zip(values, exact, strict=True)]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{statistics.mean(pairs):+.2g} +- {error:.2g}"


def row(name: str, runs: Sequence[Trained], exact: Sequence[Trained]) -> str:
    """A row of the table; the rate is a geometric mean."""
    columns = {field: [getattr(run, field) for run in runs] for field in Trained._fields}
    apart = {
        field: "-" if runs is exact else difference(values, [getattr(e, field) for e in exact])
        for field, values in columns.items()
    }
    return (
        f"| {name} | {statistics.mean(columns['drops']):.1f} | {apart['drops']} "
        f"| {statistics.geometric_mean(columns['rate']):.3g} "
        f"| {statistics.mean(columns['quality']):.4g} | {apart['quality']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=4, help="at least 2")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--task", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds: expected at least 2, got {options.seeds}")
    lengths = {name: TASKS[name][1] // (10 if options.quick else 1) for name in options.task}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        waiting = {
            (task, schedule, buckets): [
                pool.submit(train, task, schedule, buckets, seed, steps)
                for seed in range(options.first_seed, options.first_seed + options.seeds)
            ]
            for task, steps in lengths.items()
            for schedule in options.schedule
            for buckets in (*BUCKETS, NUDGED)
        }
        for task, steps in lengths.items():
            measure = TASKS[task][0].measure
            for schedule in options.schedule:
                runs = {
                    b: [run.result() for run in waiting[task, schedule, b]]
                    for b in (*BUCKETS, NUDGED)
                }
                print(f"{schedule}, {task}, {steps} steps, {options.seeds} seeds")
                print()
                print(f"| buckets | drops | difference | last rate | {measure} | difference |")
                print("|:--|--:|--:|--:|--:|--:|")
                for buckets, of_seeds in runs.items():
                    name = {None: "exact", NUDGED: "exact, nudged"}.get(buckets, f"{buckets}")
                    print(row(name, of_seeds, runs[None]))
                print(flush=True)


if __name__ == "__main__":
    main()
