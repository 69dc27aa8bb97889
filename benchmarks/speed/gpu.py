"""Throughput of the table's operations on one GPU, compared with torch's own reads.

    python benchmarks/speed/gpu.py [--output benchmarks/results] [--minutes 3.5] [--quick]

Reads of all parameters alternate in one process, and every figure is a median of 20. Device time is
that of CUDA events around the call, which waits in the queue behind a kernel that sleeps: so the
device does not wait for the host between its launches. Host time is the call on an empty queue
without waiting. GB/s counts the bytes that must move at least: the parameters' own for a read, and
48 a bucket for a close. The cache is flushed before every call.

The peers: ``torch.sum`` over one flat tensor of as many bytes, which is a plain read;
``_foreach_norm`` over the parameters, which reads them too; and ``_foreach_add_`` to float32 sums,
which reads and writes 8 bytes an element more. If apex is installed, its kernels for the norm and
for the sums are measured as well.

Writes NAME.jsonl, a row as soon as it is measured, and NAME.md; NAME is that of the GPU. No new
shape is begun when the minutes are over; the .md says which were left out. What was expected before
any run is in ``benchmarks/results/gpu-predictions``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from shapes import resnet50, transformer
from torch import Tensor

from autodrop_ext.ops import BACKENDS
from autodrop_ext.ops.plan import Plan, Source

ROUNDS, BUCKETS = 20, 2**18
BILLION = transformer(width=2048, layers=24, vocabulary=32_000)  # 1.27e9 parameters, 292 tensors

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "resnet50": resnet50(),
    "transformer1b": BILLION,
    "tiny10000": [(64,)] * 10_000,
    "odd": [(1_000_003 + 2 * i,) for i in range(200)],
    "misaligned": [(1_000_003 + 2 * i,) for i in range(200)],  # views that start at element 1
}
DTYPES = (torch.float32, torch.bfloat16)
Call = Callable[[], object]


class Timer:
    """Seconds of calls on the device and on the host, with a cold cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 2**28 if device.type == "cuda" else 2**20
        self.flush = torch.zeros(size, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, call: Call) -> tuple[float, float]:
        self.synchronize()
        start = time.perf_counter()
        call()
        on_host = time.perf_counter() - start
        if self.device.type == "cpu":  # only to try this script without a GPU
            return on_host, on_host
        self.flush.zero_()
        self.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # At 2 GHz, twice as long as the host took; a slower clock sleeps longer.
        torch.cuda._sleep(int(2e9 * max(2 * on_host, 1e-4)))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, on_host

    def medians(self, calls: dict[str, Call]) -> dict[str, tuple[float, float]]:
        for call in calls.values():
            for _ in range(3):
                call()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(self.once(call))
        return {
            name: (statistics.median(d for d, _ in each), statistics.median(h for _, h in each))
            for name, each in times.items()
        }


def sources(params: list[Tensor]) -> list[Source]:
    return [Source(f"p{i}", (lambda p=p: p), p.numel(), p.dtype) for i, p in enumerate(params)]


def parameters(name: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    params = [torch.randn(s, device=device).to(dtype) for s in SHAPES[name]]
    if name == "misaligned":
        params = [torch.cat([p[:1], p])[1:] for p in params]
    return params


def usable(device: torch.device) -> list[str]:
    wanted = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return [b for b in wanted if BACKENDS[b].missing(device) is None]


def apex(params: list[Tensor], sums: list[Tensor]) -> dict[str, Call]:
    """Return apex's reads of the parameters, none if it is not installed with its kernels."""
    if importlib.util.find_spec("amp_C") is None:
        return {}
    kernels = importlib.import_module("amp_C")
    apply = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    overflow = torch.zeros(1, dtype=torch.int32, device=params[0].device)
    norm, add = kernels.multi_tensor_l2norm, kernels.multi_tensor_axpby
    lists = [sums, params, sums]
    return {
        "apex l2norm": lambda: apply(norm, overflow, [params], False),
        # sums = 1 * sums + 1 * params; -1: both are looked through for infinities
        "apex axpby": lambda: apply(add, overflow, lists, 1.0, 1.0, -1),
    }


def reads(
    name: str, dtype: torch.dtype, device: torch.device, timer: Timer
) -> list[dict[str, Any]]:
    """Rows of one shape and dtype."""
    params = parameters(name, dtype, device)
    n = sum(p.numel() for p in params)
    size = n * dtype.itemsize
    start = time.perf_counter()
    plan = Plan(sources(params), device, buckets=BUCKETS)
    plan_seconds = time.perf_counter() - start
    bases = np.array([p.data_ptr() for p in params], np.int64)
    calls: dict[str, Call] = {}
    tables: dict[str, Tensor] = {}
    for b in usable(device):
        table = torch.zeros(plan.num_buckets, dtype=torch.float64, device=device)
        accumulation = BACKENDS[b].bind(plan)
        tables[b] = table
        calls[b] = lambda a=accumulation, t=table: a.accumulate(t, bases)
    flat = torch.randn(n, device=device).to(dtype)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    calls["torch.sum"] = lambda: flat.sum(dtype=torch.float32)
    calls["_foreach_norm"] = lambda: torch._foreach_norm(params)
    calls["_foreach_add_"] = lambda: torch._foreach_add_(sums, params)
    calls |= apex(params, sums)
    medians = timer.medians(calls)
    what = {"shape": name, "dtype": str(dtype).removeprefix("torch."), "operation": "read"}
    rows = []
    for who, (on_device, on_host) in medians.items():
        moved = size + 8 * n if who in ("_foreach_add_", "apex axpby") else size
        row = {"who": who, "device_us": on_device * 1e6, "host_us": on_host * 1e6}
        row |= {"gb_per_s": moved / on_device / 1e9}
        row |= {"of_plain_read": medians["torch.sum"][0] / on_device}
        rows.append(what | row | ({"plan_ms": plan_seconds * 1e3} if who in tables else {}))
    for b, table in tables.items():
        results = []
        for _ in range(3):
            table.zero_()
            calls[b]()
            results.append(table.clone())
        same = all(torch.equal(r, results[0]) for r in results)
        rows.append(what | {"who": b, "operation": "same bits three times", "same": same})
    return rows


def closes(buckets: int, device: torch.device, timer: Timer) -> list[dict[str, Any]]:
    bounds = np.array([0, buckets], np.int64)
    calls: dict[str, Call] = {}
    for b in usable(device):
        three = [torch.randn(buckets, dtype=torch.float64, device=device) for _ in range(3)]
        calls[b] = lambda b=b, t=three: BACKENDS[b].close(*t, 64.0, bounds)
    return [
        {"shape": f"{buckets} buckets", "dtype": "float64", "operation": "close", "who": who}
        | {"device_us": d * 1e6, "host_us": h * 1e6, "gb_per_s": 48 * buckets / d / 1e9}
        for who, (d, h) in timer.medians(calls).items()
    ]


def markdown(gpu: str, rows: list[dict[str, Any]], left_out: list[str]) -> str:
    lines = [f"# {gpu}, torch {torch.__version__}", ""]
    lines += ["| shape | dtype | operation | who | device, us | host, us | GB/s | of torch.sum |"]
    lines += ["|:--|:--|:--|:--|--:|--:|--:|--:|"]
    for r in rows:
        if "device_us" in r:
            share = f"{100 * r['of_plain_read']:.0f} %" if "of_plain_read" in r else ""
            lines.append(
                f"| {r['shape']} | {r['dtype']} | {r['operation']} | {r['who']} "
                f"| {r['device_us']:.1f} | {r['host_us']:.1f} | {r['gb_per_s']:.0f} | {share} |"
            )
    unequal = [f"{r['shape']} {r['dtype']} {r['who']}" for r in rows if r.get("same") is False]
    lines += ["", f"Three reads gave the same bits: {'not ' + str(unequal) if unequal else 'yes'}."]
    if importlib.util.find_spec("amp_C") is None:
        lines += ["", "apex is not installed."]
    if left_out:
        lines += ["", f"Left out, because time was over: {', '.join(left_out)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="the two smallest shapes only")
    parser.add_argument("--minutes", type=float, default=3.5, help="then no shape is begun")
    parser.add_argument("--device", default="cuda", help="cpu tries the script without a GPU")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU; on the CPU run: make bench")
    end = time.monotonic() + 60 * arguments.minutes
    device = torch.device(arguments.device, 0 if arguments.device == "cuda" else None)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    stem = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    arguments.output.mkdir(parents=True, exist_ok=True)
    timer = Timer(device)
    shapes = ("resnet50", "tiny10000") if arguments.quick else tuple(SHAPES)
    work: dict[str, Callable[[], list[dict[str, Any]]]] = {
        f"close {n}": (lambda n=n: closes(n, device, timer)) for n in (2**18, 2**26)
    }
    for name in shapes:
        for dtype in DTYPES:
            what = f"{name} {str(dtype).removeprefix('torch.')}"
            work[what] = lambda name=name, dtype=dtype: reads(name, dtype, device, timer)
    rows: list[dict[str, Any]] = []
    left_out = []
    with (arguments.output / f"{stem}.jsonl").open("w") as file:
        for what, measure in work.items():
            if time.monotonic() > end:
                left_out.append(what)
                continue
            for row in measure():
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    text = markdown(gpu, rows, left_out)
    (arguments.output / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
