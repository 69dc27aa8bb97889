"""What the meter costs from 25 million to a trillion parameters, on 1 to 10,000 GPUs.

    python benchmarks/speed/scaling.py measure [--json build/scaling.json] [--threads 1]
    python benchmarks/speed/scaling.py table   [--json build/scaling.json] [...]
    python benchmarks/speed/scaling.py plot    --to docs/images/scaling.png [...]

``measure`` takes the constants of the model on this machine: bytes of arenas and tables, bytes of
rows in the collective, host time of a step and of a window's end. ``table`` and ``plot`` put them
into the model, with a GPU's bandwidth and a training step's length that are *assumed*, not
measured; both are arguments. See docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapes
import torch

from autodrop_ext import AngularVelocity
from autodrop_ext.distributed.agreement import Row
from autodrop_ext.ops.window_sums import Watched
from autodrop_ext.sampling.draw import CHUNK_ELEMENTS, LEAST_CHUNKS
from autodrop_ext.sampling.sums import SamplingError, sums_of

WINDOW = 64
ELEMENT = 2  # bytes of a bfloat16 parameter
PEAK = 990e12  # operations a second of one GPU, bfloat16; assumed
UTILISATION = 0.4  # of it, in training; assumed
TOKENS = 4e6  # in a global batch; assumed


@dataclass(frozen=True)
class Model:
    """A model and the GPUs it is trained on, its parameters cut evenly over all of them."""

    name: str
    parameters: float
    tensors: int
    gpus: int


MODELS = (
    Model("25 million", 25.6e6, 161, 1),
    Model("1 billion", 1e9, 150, 1),
    Model("8 billion", 8e9, 291, 8),
    Model("70 billion", 70e9, 723, 64),
    Model("405 billion", 405e9, 1138, 1024),
    Model("1 trillion", 1e12, 1500, 10_000),
)


# ---- the model ----------------------------------------------------------------------------------


def chunks_read(model: Model, fraction: float) -> float:
    """Sampled chunks on each GPU: the fraction, but at least two of each tensor's part."""
    here = model.parameters / model.gpus / CHUNK_ELEMENTS
    return min(here, max(fraction * here, LEAST_CHUNKS * model.tensors))


def arena_bytes(model: Model, fraction: float | None) -> float:
    """Of one GPU."""
    elements = model.parameters / model.gpus
    if fraction is not None:
        elements = chunks_read(model, fraction) * CHUNK_ELEMENTS
    return 12 * elements


def step_bytes(model: Model, fraction: float | None) -> float:
    """Moved by one GPU in a step, sum form: a parameter is read, its sum read and written."""
    return arena_bytes(model, fraction) / 12 * (ELEMENT + 8)


def row_bytes(constants: dict[str, Any], fraction: float | None) -> float:
    """Sent by each rank at the end of a window."""
    return float(constants["row_bytes"]["exact" if fraction is None else "sampled"])


def step_seconds(
    model: Model, fraction: float | None, bandwidth: float, constants: dict[str, Any]
) -> float:
    """On one GPU, a step and its share of a window's end."""
    moved = (step_bytes(model, fraction) + arena_bytes(model, fraction) / WINDOW) / bandwidth
    host = 0.0
    if fraction is not None:
        host = constants["window_seconds_a_chunk"] * chunks_read(model, fraction) / WINDOW
    return moved + host


def training_seconds(model: Model) -> float:
    """Of one training step: 6 operations a parameter and token."""
    return 6 * model.parameters * TOKENS / (model.gpus * PEAK * UTILISATION)


# ---- constants ----------------------------------------------------------------------------------


def measure(threads: int, repeats: int = 15) -> dict[str, Any]:
    """Constants of the model on this machine."""
    torch.set_num_threads(threads)
    params = shapes.tensors("resnet50", torch.float32)
    elements = sum(p.numel() for p in params)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "elements": elements,
        "bytes_a_parameter": {},
        "row_bytes": {},
        "step_seconds": {},
    }
    for name, sample in (("exact", None), ("1/16", 1 / 16), ("1/64", 1 / 64)):
        watched = [Watched(f"t{i}", p, 1.0, f"t{i}", p.numel()) for i, p in enumerate(params)]
        sums = sums_of(sample, 0)(watched, "auto")
        while not sums.devices:  # the survey
            sums.begin_window()
            torch._foreach_mul_(params, 1.0001)
        for first in (True, False):
            sums.add("sum", first=first)
        sums.close(2)
        result["bytes_a_parameter"][name] = sums.device_bytes / elements
        numbers = sum(extra.size for extra in sums.extras())
        kind = "exact" if sample is None else "sampled"
        result["row_bytes"][kind] = 8 * (len(Row._fields) + numbers)
        result["step_seconds"][name] = _median(lambda s=sums: s.add("sum", first=False), repeats)
        if name == "1/16":
            result["window_seconds_a_chunk"] = (
                _median(lambda s=sums: SamplingError().local(s), repeats)
                / sums.devices[0].plan.num_chunks
            )
    tiny = AngularVelocity([torch.randn(64)], 1_000_000)
    tiny.observe()
    result["host_seconds_a_step"] = _median(tiny.observe, 66 * repeats)
    exact = result["step_seconds"]["exact"]
    result["bandwidth"] = 12 * elements / exact
    return result


def _median(work: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


# ---- output -------------------------------------------------------------------------------------


def _amount(value: float) -> str:
    """Bytes with a unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def print_table(constants: dict[str, Any], bandwidth: float, fraction: float) -> None:
    part = f"1/{1 / fraction:.0f}"
    print(
        f"Parameters in bfloat16, windows of {WINDOW} steps, {bandwidth / 1e12:g} TB/s a GPU and "
        f"{UTILISATION:.0%} of {PEAK / 1e12:.0f} Tflop/s assumed, global batches of "
        f"{TOKENS / 1e6:g} million tokens.\n"
    )
    columns = ["model", "GPUs", "training step", "memory a GPU, exact", part, "a step, exact", part]
    columns += ["of training, exact", part, "all rows of a window, exact", part]
    print(f"| {' | '.join(columns)} |")
    print(f"|:--|{'--:|' * (len(columns) - 1)}")
    for model in MODELS:
        training = training_seconds(model)
        cells = [model.name, f"{model.gpus:,}", f"{training:.3g} s"]
        both = (None, fraction)
        cells += [_amount(arena_bytes(model, f)) for f in both]
        times = [step_seconds(model, f, bandwidth, constants) for f in both]
        cells += [f"{1e3 * t:.2g} ms" for t in times]
        cells += [f"{100 * t / training:.1g} %" for t in times]
        cells += [_amount(model.gpus * row_bytes(constants, f)) for f in both]
        print(f"| {' | '.join(cells)} |")


def draw(constants: dict[str, Any], bandwidth: float, path: pathlib.Path) -> None:
    """Memory and time a GPU over the parameters that lie on it."""
    from matplotlib.figure import Figure

    here = np.logspace(7, 10.3, 60)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, share = figure.subplots(1, 2)
    lines = ((None, "exact", "-"), (1 / 16, "1/16", "--"), (1 / 64, "1/64", ":"))
    for fraction, label, dashes in lines:
        models = [Model("", n, 300, 1) for n in here]
        memory.loglog(here, [arena_bytes(m, fraction) for m in models], dashes, label=label)
        seconds = [step_seconds(m, fraction, bandwidth, constants) for m in models]
        share.loglog(here, [1e3 * s for s in seconds], dashes, label=label)
    memory.set_ylabel("bytes on a GPU")
    share.set_ylabel("ms a step")
    for axes, title in (
        (memory, "Memory"),
        (share, f"Time at {bandwidth / 1e12:g} TB/s (assumed)"),
    ):
        axes.set_title(title, loc="left", fontweight="bold", fontsize="medium")
        axes.set_xlabel("parameters on a GPU")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["measure", "table", "plot"])
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("build/scaling.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bandwidth", type=float, default=4.0e12, help="of a GPU, bytes a second")
    parser.add_argument("--fraction", type=float, default=1 / 64)
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("docs/images/scaling.png"))
    arguments = parser.parse_args()
    if arguments.command == "measure":
        constants = measure(arguments.threads)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(constants, indent=1) + "\n")
        print(json.dumps(constants, indent=1))
        return
    constants = json.loads(arguments.json.read_text())
    if arguments.command == "table":
        print_table(constants, arguments.bandwidth, arguments.fraction)
    else:
        draw(constants, arguments.bandwidth, arguments.to)


if __name__ == "__main__":
    main()
