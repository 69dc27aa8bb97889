"""What AnytimeAutoDrop's meter costs over a run, next to a sum of the parameters at every step.

    python benchmarks/speed/anytime.py counts              # snapshots and closes; a minute
    python benchmarks/speed/anytime.py run [--steps N]     # time on models' shapes; minutes
    python benchmarks/speed/anytime.py window              # 16 of 64 snapshots; a minute

``run`` calls ``scheduler.step()`` and ``torch._foreach_add_`` of float32 sums in turns, step by
step, and adds their times up. ``window`` compares whole windows with their close, in turns. A
snapshot reads a parameter and reads and writes its sum, as ``_foreach_add_`` does: 12 bytes a
float32 parameter. A close reads three sums: 12 bytes. A doubling reads three and writes two: 20.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing

import torch
from autodrop_ext.ops.window_sums import WindowSums
from optimizers import OneMoves
from peers import Foreach
from shapes import SHAPES, tensors

from autodrop_ext import AngularVelocity, AnytimeAutoDrop

LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
MODELS = ("resnet50", "transformer60m")
ROUNDS, WINDOW, SNAPSHOTS = 15, 64, 16


class Counted:
    """Counts snapshots, those of windows that have ended, and closes, of every meter."""

    def __enter__(self) -> Counted:
        self.snapshots = self.in_closed = self.closes = 0
        self._add, self._close = WindowSums.add, WindowSums.close
        counted = self

        def add(*args: object, **kwargs: object) -> None:
            counted.snapshots += 1
            counted._add(*args, **kwargs)  # type: ignore[arg-type]

        def close(*args: object, **kwargs: object) -> object:
            counted.closes += 1
            counted.in_closed = counted.snapshots
            return counted._close(*args, **kwargs)  # type: ignore[arg-type]

        WindowSums.add, WindowSums.close = add, close  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        WindowSums.add, WindowSums.close = self._add, self._close  # type: ignore[method-assign]


def counts() -> None:
    """Run a scheduler over one small tensor and print how often it reads it."""
    print("| steps | snapshots in closed windows | all | closes | all per step |")
    print("|--:|--:|--:|--:|--:|")
    optimizer = OneMoves([torch.zeros(2).requires_grad_()])
    with Counted() as counted, closing(AnytimeAutoDrop(optimizer)) as scheduler:
        for step in range(1, LENGTHS[-1] + 1):
            optimizer.step()
            scheduler.step()
            if step in LENGTHS:
                print(
                    f"| {step:,} | {counted.in_closed:,} | {counted.snapshots:,} "
                    f"| {counted.closes:,} | {counted.snapshots / step:.4f} |",
                    flush=True,
                )


def run(model: str, steps: int) -> None:
    """Time a run and a sum at every step, in turns, and print a row of the table."""
    params = [p.requires_grad_() for p in tensors(model, torch.float32)]
    optimizer, peer = OneMoves(params), Foreach(params)
    elements = sum(p.numel() for p in params)
    ours = theirs = 0.0
    with Counted() as counted, closing(AnytimeAutoDrop(optimizer)) as scheduler:
        for step in range(1, steps + 1):
            optimizer.step()
            begin = time.perf_counter()
            scheduler.step()
            between = time.perf_counter()
            with torch.no_grad():
                peer.accumulate(first=step == 1)
            end = time.perf_counter()
            ours, theirs = ours + between - begin, theirs + end - between
        doublings = (scheduler.window // 16).bit_length() - 1
    moved = elements * (12 * (counted.snapshots + counted.closes) + 20 * doublings)
    print(
        f"| {model} | {steps:,} | {counted.snapshots:,} | {counted.closes} | {ours:.2f} "
        f"| {theirs:.2f} | {ours / theirs:.2f} | {moved / 1e9:,.0f} "
        f"| {12 * elements * steps / 1e9:,.0f} |",
        flush=True,
    )


def window(model: str) -> None:
    """Time windows of 64 steps and their closes, 16 snapshots against 64 sums, in turns."""
    params = tensors(model, torch.float32)
    # Held in sum form: parameters that stand still would ask for delta form.
    meter = AngularVelocity(params, WINDOW, snapshots=SNAPSHOTS, form="sum")
    peer = Foreach(params)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(ROUNDS + 2):
        torch._foreach_mul_(params, 1.01)  # parameters that stand still would earn a warning
        begin = time.perf_counter()
        for _ in range(WINDOW):
            meter.observe()
        between = time.perf_counter()
        for step in range(WINDOW):
            peer.accumulate(first=step == 0)
        peer.close(WINDOW)
        ours.append(between - begin)
        theirs.append(time.perf_counter() - between)
    mine, other = (1e3 * statistics.median(times[2:]) for times in (ours, theirs))
    print(f"| {model} | {mine:.1f} | {other:.1f} | {other / mine:.2f}x |", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("counts", "run", "window"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1_000])
    parser.add_argument("--model", nargs="+", choices=tuple(SHAPES), default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.what == "counts":
        counts()
    elif options.what == "run":
        print("| model | steps | snapshots | closes | ours, s | sums, s | ratio | GB | GB, sums |")
        print("|:--|--:|--:|--:|--:|--:|--:|--:|--:|")
        for model in options.model:
            for steps in options.steps:
                run(model, steps)
    else:
        print(
            f"| {WINDOW} steps and the close | {SNAPSHOTS} snapshots, ms | foreach, ms | faster |"
        )
        print("|:--|--:|--:|--:|")
        for model in options.model:
            window(model)


if __name__ == "__main__":
    main()
