"""What AutoDrop costs where tensors are many and small, so that the host's work is all there is.

    python benchmarks/speed/host_time.py [--counts 10 200 2000 10000] [--repeats N]

Every tensor has 64 float32 elements, and the optimizer moves the first one only. In turns:
``step()`` of AutoDrop inside a window, ``step()`` of torch's StepLR, and ``torch._foreach_add_``
into float32 sums, which moves 12 bytes an element, AutoDrop 4. Then the first step, which finds the
parameters and makes the tables, and the step that ends the third window, with the first angle. Up
to 4,096 tensors every element has its own bucket; of more, elements are hashed. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import closing

import torch
from optimizers import OneMoves
from torch.optim.lr_scheduler import StepLR

from autodrop_ext import AutoDrop

ELEMENTS, WINDOW = 64, 32


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(count: int, repeats: int) -> dict[str, float]:
    """Medians in seconds."""
    params = [torch.randn(ELEMENTS).requires_grad_() for _ in range(count)]
    sums = [torch.zeros(ELEMENTS) for _ in range(count)]
    optimizer = OneMoves(params)
    other = StepLR(OneMoves(params), 10**9)
    times: dict[str, list[float]] = {
        name: [] for name in ("step", "StepLR", "foreach", "first", "close")
    }

    @torch.no_grad()
    def foreach() -> None:
        torch._foreach_add_(sums, params)

    for _ in range(repeats):
        with closing(AutoDrop(optimizer, window=WINDOW)) as scheduler:
            for step in range(1, 3 * WINDOW + 1):
                optimizer.step()
                took = seconds(scheduler.step)
                if step == 1:
                    times["first"].append(took)
                elif step == 3 * WINDOW:
                    times["close"].append(took)
                elif step % WINDOW > 1:
                    times["step"].append(took)
                other.optimizer.step()
                times["StepLR"].append(seconds(other.step))
                times["foreach"].append(seconds(foreach))
    return {name: statistics.median(of) for name, of in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 200, 2000, 10_000])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print("| tensors | a step | StepLR | foreach | the first step | the end of a window |")
    print("|--:|--:|--:|--:|--:|--:|")
    for count in options.counts:
        of = measure(count, options.repeats)
        cells = [f"{1e6 * of[name]:,.3g} µs" for name in ("step", "StepLR", "foreach")]
        cells += [f"{1e3 * of[name]:.2g} ms" for name in ("first", "close")]
        print(f"| {count:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
