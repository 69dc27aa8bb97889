"""Memory that AutoDrop takes: of this process, and on the devices that hold a large model.

    python benchmarks/speed/memory.py

First line: how much the process grows for 100 million float32 parameters on the CPU, from before
the scheduler is made until after its third window with an angle. Plans and tables are counted,
and so is what is used for a moment only: it is the peak of the resident memory.

The table: bytes of the meter on each device for the shapes of a model with 8 billion parameters, on
one GPU and on one of 64 that share it by their first dimension (FSDP2). Both come from plans of
the shapes, without the parameters. ``tables`` are those of three windows; ``pieces`` says which
stretches go where, 32 bytes for each of 4,096 elements; ``partial rows`` are those of blocks of a
GPU that share a row. With an average come 4 bytes a parameter.
"""

from __future__ import annotations

import argparse
import math
import pathlib

import torch
from optimizers import OneMoves
from shapes import transformer

from autodrop_ext import AutoDrop
from autodrop_ext.global_index import Cut, axis_of, runs_of
from autodrop_ext.ops.cuda import splits
from autodrop_ext.ops.plan import Plan, Source

BUCKETS = 2**18
ELEMENTS = 100_000_000
LARGE = transformer(width=4096, layers=36, vocabulary=128_000)  # 7.8e9 parameters, 436 tensors
MIB = 2**20


def peak() -> int:
    """Largest resident memory of this process since :func:`reset_peak`, bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def reset_peak() -> None:
    """Make the present resident memory the largest one (Linux, ``man 5 proc``)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def growth(elements: int) -> int:
    """Bytes by which the process grows at most over four windows."""
    rows = elements // 1000
    parts = [rows // 2, rows // 4, rows - rows // 2 - rows // 4]
    params = [torch.ones(1000, requires_grad=True)]  # the only one that moves
    params += [torch.ones(part, 1000, requires_grad=True) for part in parts]
    optimizer = OneMoves(params)
    optimizer.step()
    reset_peak()
    before = peak()
    scheduler = AutoDrop(optimizer, 2, buckets=BUCKETS)
    for _ in range(8):
        optimizer.step()
        scheduler.step()
    grown = peak() - before
    if len(scheduler.history) != 2 or scheduler.history[-1].angle is None:
        raise RuntimeError(f"expected two angles, got {scheduler.history}")
    scheduler.close()
    return grown


def on_device(shapes: list[tuple[int, ...]], ranks: int) -> dict[str, int]:
    """Bytes of the meter on the device of the first of so many ranks."""
    sources = []
    for i, shape in enumerate(shapes):
        rows = -(-shape[0] // ranks)
        axes = [axis_of(shape[0], [Cut(ranks, 0, 1)], rows), *map(range, shape[1:])]
        assert axes[0] is not None
        numel = rows * math.prod(shape[1:])
        sources.append(
            Source(
                f"{i}",
                lambda shape=shape: torch.empty(shape, device="meta"),  # type: ignore[misc]
                numel,
                torch.float32,
                runs=runs_of(shape, axes),  # type: ignore[arg-type]
            )
        )
    plan = Plan(sources, torch.device("meta"), buckets=BUCKETS)
    blocks = splits(plan)
    return {
        "parameters here": sum(source.numel for source in sources),
        "tables": 3 * 8 * plan.num_buckets,
        "pieces": plan.table.nbytes + plan.runs.nbytes,
        "partial rows": 8 * plan.num_buckets * blocks if blocks > 1 else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    elements = parser.parse_args().elements
    print(f"{elements:,} float32 parameters: the process grows by {growth(elements) / MIB:.1f} MiB")
    print()
    total = sum(math.prod(shape) for shape in LARGE)
    print(f"| ranks of {total / 1e9:.2f}e9 | parameters here | tables, MiB | pieces, MiB ", end="")
    print("| partial rows, MiB | together, MiB | per parameter here |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for ranks in (1, 64):
        of = on_device(LARGE, ranks)
        here = of.pop("parameters here")
        cells = [f"{value / MIB:.1f}" for value in (*of.values(), sum(of.values()))]
        print(f"| {ranks} | {here:,} | {' | '.join(cells)} | {sum(of.values()) / here:.4f} bytes |")


if __name__ == "__main__":
    main()
