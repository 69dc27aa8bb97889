"""What AnytimeAutoDrop costs over a run, next to a sum of the parameters at every step.

    python benchmarks/speed/anytime.py counts [--steps N ...]   # reads and closes; seconds
    python benchmarks/speed/anytime.py run [--steps N ...]      # time on models' shapes; a minute

``counts`` runs the scheduler over one small tensor. ``run`` multiplies these counts with the median
time of ``scheduler.step()`` in a step that reads nothing, that reads the parameters into the table,
that also moves their average, and that also closes a window. Each is timed in turns with
``torch._foreach_add_`` of float32 sums, which a meter without this schedule would call at every
step. A read moves 4 bytes a float32 parameter and 2 in half precision, an average these again and 8
more (it reads and writes the average), and so does ``_foreach_add_``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from optimizers import OneMoves
from peers import Foreach
from shapes import SHAPES, tensors
from torch import Tensor

from autodrop_ext import AnytimeAutoDrop

MODELS = ("resnet50", "transformer60m")
HALF = ("transformer60m",)  # whose parameters are bfloat16
WINDOWS, WINDOW, SNAPSHOTS = 6, 64, 16  # of the runs that are timed


class Counts(NamedTuple):
    """What a run does.

    Attributes:
        steps: optimizer steps.
        reads: those after which the meter reads the parameters, and their average is moved.
        closes: windows that end.
    """

    steps: int
    reads: int
    closes: int


class Times(NamedTuple):
    """Seconds of a ``scheduler.step()`` of each kind, and of a sum."""

    idle: float
    read: float
    close: float
    foreach: float


def counts(lengths: Sequence[int]) -> list[Counts]:
    """Count what a scheduler does in runs of these lengths."""
    optimizer = OneMoves([torch.zeros(2).requires_grad_()])
    reads = 0
    rows = []
    with closing(AnytimeAutoDrop(optimizer)) as scheduler:
        for step in range(1, max(lengths) + 1):
            optimizer.step()
            scheduler.step()
            reads += scheduler.meter.has_read
            if step in lengths:
                rows.append(Counts(step, reads, scheduler.meter.windows))
    return rows


def times(params: list[Tensor], *, average: bool) -> Times:
    """Medians; windows here are long enough to have steps of every kind."""
    optimizer, peer = OneMoves(params), Foreach(params)
    of_kind: dict[str, list[float]] = {kind: [] for kind in Times._fields}
    scheduler = AnytimeAutoDrop(
        optimizer, min_window=WINDOW, windows=WINDOWS, snapshots=SNAPSHOTS, average=average
    )
    with closing(scheduler):
        for step in range(1, WINDOWS * WINDOW + 1):
            optimizer.step()
            begin = time.perf_counter()
            scheduler.step()
            between = time.perf_counter()
            with torch.no_grad():
                peer.accumulate()
            end = time.perf_counter()
            kind = "idle"
            if scheduler.meter.has_read:
                kind = "read" if step % WINDOW else "close"
            if step > WINDOW:  # plans and averages are made in the first window
                of_kind[kind].append(between - begin)
                of_kind["foreach"].append(end - between)
    return Times(*(statistics.median(of_kind[kind]) for kind in Times._fields))


def run(model: str, lengths: Sequence[int]) -> None:
    """Print the rows of a model: what the scheduler takes without and with its average."""
    dtype = torch.bfloat16 if model in HALF else torch.float32
    params = [p.requires_grad_() for p in tensors(model, dtype)]
    elements, size = sum(p.numel() for p in params), dtype.itemsize
    bare, averaging = times(params, average=False), times(params, average=True)
    move = max(0.0, averaging.read - bare.read)
    for n in counts(lengths):
        ours = (n.steps - n.reads) * bare.idle + (n.reads - n.closes) * bare.read
        ours += n.closes * bare.close
        with_average = ours + n.reads * move
        theirs = n.steps * statistics.mean([bare.foreach, averaging.foreach])
        moved = [size * n.reads, (2 * size + 8) * n.reads, (size + 8) * n.steps]
        seconds = f"{ours:.2f} | {with_average:.2f} | {theirs:.2f}"
        bytes_ = " | ".join(f"{elements * each / 1e9:,.0f}" for each in moved)
        shares = f"{ours / theirs:.3f} | {with_average / theirs:.3f}"
        print(f"| {model} | {n.steps:,} | {seconds} | {shares} | {bytes_} |", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("counts", "run"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--model", nargs="+", choices=tuple(SHAPES), default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(2)
    # Nothing is trained: one tensor moves, so that the time of an optimizer is left out.
    warnings.filterwarnings("ignore", message=".*half-precision parameters hardly move")
    if options.what == "counts":
        print("| steps | reads | closes | reads per step |")
        print("|--:|--:|--:|--:|")
        for n in counts(options.steps):
            print(f"| {n.steps:,} | {n.reads:,} | {n.closes} | {n.reads / n.steps:.4f} |")
        return
    print(
        "| model | steps | meter, s | with average, s | sums, s | meter / sums "
        "| with average / sums | GB | GB with average | GB, sums |"
    )
    print("|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for model in options.model:
        run(model, options.steps)


if __name__ == "__main__":
    main()
