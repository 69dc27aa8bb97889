"""Throughput on one GPU, compared with torch's own operations, with CUDA events.

    python benchmarks/speed/gpu.py [--output benchmarks/results] [--quick] [--minutes 9]

Both sides alternate in one process, and every figure is a median of 20. Device time is that of CUDA
events around the call, which waits in the queue behind a kernel that sleeps: so the device does not
wait for the host between its launches. (A close synchronises at its end; its device time contains
that wait's return, some microseconds.) Host time is the call on an empty queue without waiting.
GB/s counts the bytes that the operation must move at least: 8 and the parameter's own bytes per
element and step, 12 per close. Peers are checked against float64 before anything is timed.

Writes NAME.jsonl, a row as soon as it is measured, and at the end NAME.json and NAME.md; NAME is
that of the GPU. No new shape is begun when the minutes are over; the .md says which were left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peers import Foreach, against_float64
from shapes import resnet50, transformer
from torch import Tensor

from autodrop_ext import AngularVelocity
from autodrop_ext.ops import BACKENDS
from autodrop_ext.ops.device_sums import DeviceSums
from autodrop_ext.ops.plan import Plan

ROUNDS, WINDOW = 20, 64
MOST_COMPILED = 400  # tensors; torch.compile takes many minutes for 10,000
BILLION = transformer(width=2048, layers=24, vocabulary=32_000)  # 1.27e9 parameters, 292 tensors
SHARD = transformer(width=4096, layers=32, vocabulary=128_000)  # 8e9 parameters, in eight parts

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "resnet50": resnet50(),
    "transformer1b": BILLION,
    "shard of 8b": [(max(1, s[0] // 8), *s[1:]) for s in SHARD],
    "tiny10000": [(64,)] * 10_000,
    "odd": [(1_000_003 + 2 * i,) for i in range(200)],
    "misaligned": [(1_000_003 + 2 * i,) for i in range(200)],  # views that start at element 1
    "2^31": [(2**31 + 100,)],
}
DTYPES = (torch.float32, torch.bfloat16)


def device_seconds(device: torch.device, call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call on the device, and on the host without waiting."""
    start = time.perf_counter()
    call()
    on_host = time.perf_counter() - start
    if device.type == "cpu":  # only to try this script where there is no GPU
        return on_host, on_host
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(sleep_cycles(on_host))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, on_host


def sleep_cycles(host_seconds: float) -> int:
    """Cycles for which the device sleeps while the host launches: twice as long as that took.

    At 2 GHz, and at least 100 microseconds; a slower clock sleeps longer.
    """
    return int(2e9 * max(2 * host_seconds, 1e-4))


def median_times(
    device: torch.device, calls: dict[str, Callable[[], object]]
) -> dict[str, dict[str, float]]:
    """Medians of every call, in turns; and its launches and extra memory, once."""
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            synchronize(device)
            times[name].append(device_seconds(device, call))
    result = {}
    for name, call in calls.items():
        on_device, on_host = (statistics.median(t) for t in zip(*times[name], strict=True))
        result[name] = {"device_us": on_device * 1e6, "host_us": on_host * 1e6}
        if device.type == "cuda":
            result[name] |= launches_and_memory(call)
    return result


def launches_and_memory(call: Callable[[], object]) -> dict[str, float]:
    """Kernels and copies that a call starts, and bytes it allocates at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "launches": len(events),
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
    }


def peer_calls(
    params: list[Tensor], sums: list[Tensor], with_graph: bool
) -> dict[str, Callable[[], object]]:
    """The peers, each adding ``params`` to float32 sums."""

    def per_tensor() -> None:
        for s, p in zip(sums, params, strict=True):
            s.add_(p)

    staging = [torch.empty_like(s) for s in sums]

    def copy_then_add() -> None:
        torch._foreach_copy_(staging, params)
        torch._foreach_add_(sums, staging)

    flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)

    def flattening() -> None:
        flat.add_(torch.nn.utils.parameters_to_vector(params))

    model = torch.nn.ParameterList(params)
    averaged = torch.optim.swa_utils.AveragedModel(model)  # a running mean in the params' dtype
    calls: dict[str, Callable[[], object]] = {
        "per-tensor add_": per_tensor,
        "_foreach_add_": lambda: torch._foreach_add_(sums, params),
        "_foreach_copy_ and _foreach_add_": copy_then_add,
        "parameters_to_vector and add_": flattening,
        "AveragedModel": lambda: averaged.update_parameters(model),
    }
    if with_graph and len(params) <= MOST_COMPILED:
        graph = torch.cuda.CUDAGraph()
        torch._foreach_add_(sums, params)
        with torch.cuda.graph(graph):
            torch._foreach_add_(sums, params)
        calls["CUDA graph of _foreach_add_"] = graph.replay
        compiled = torch.compile(lambda: torch._foreach_add_(sums, params))
        calls["torch.compile of _foreach_add_"] = compiled
    try:
        from amp_C import multi_tensor_axpby
        from apex.multi_tensor_apply import multi_tensor_applier
    except ImportError:
        return calls
    overflow = torch.zeros(1, dtype=torch.int32, device=params[0].device)
    calls["apex multi_tensor_axpby"] = lambda: multi_tensor_applier(
        multi_tensor_axpby, overflow, [sums, params, sums], 1.0, 1.0, -1
    )
    return calls


Note = Callable[[dict[str, Any]], None]


def measure(name: str, dtype: torch.dtype, device: torch.device, note: Note) -> None:
    """Note all rows of one shape and dtype, each as soon as it is there."""
    params = [torch.randn(s, device=device).to(dtype) for s in SHAPES[name]]
    if name == "misaligned":
        params = [torch.cat([p[:1], p])[1:] for p in params]
    n = sum(p.numel() for p in params)
    own = n * params[0].element_size()
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    start = time.perf_counter()
    plan = Plan(named, device)
    synchronize(device)
    plan_seconds = time.perf_counter() - start
    wanted = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    usable = [b for b in wanted if BACKENDS[b].missing(device) is None]
    arenas = {b: DeviceSums(plan, BACKENDS[b]) for b in usable}
    for a in arenas.values():
        a.begin("sum")

    def add(operation: str, calls: dict[str, Callable[[], object]], moved: int) -> None:
        rows = median_times(device, calls)
        for who, figures in rows.items():
            row: dict[str, Any] = {"shape": name, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"operation": operation, "who": who, **figures}
            row["gb_per_s"] = moved / figures["device_us"] / 1e3
            row["plan_ms"] = plan_seconds * 1e3
            foreach = rows.get("_foreach_add_", figures)["device_us"] - figures["device_us"]
            if operation == "accumulate" and who in arenas and foreach > 0:
                # After how many steps the plan has paid for itself.
                row["plan_paid_after_steps"] = plan_seconds * 1e6 / foreach
            note(row)

    huge = n > 2**31
    calls: dict[str, Callable[[], object]] = {
        b: (lambda a=a: a.add(first=False)) for b, a in arenas.items()
    }
    closes: dict[str, Callable[[], object]] = {
        b: (lambda a=a: a.close(WINDOW)) for b, a in arenas.items()
    }
    if not huge:
        peer = Foreach(params)
        calls |= peer_calls(params, peer.running, with_graph=device.type == "cuda" and n < 2e9)
        closes["_foreach_*"] = lambda: peer.close(WINDOW)
    add("accumulate", calls, own + 8 * n)
    add("close", closes, 12 * n)

    for b, a in arenas.items():
        same = len({tuple(a.close(WINDOW)) for _ in range(10) if rewind(a)}) == 1
        what = {"shape": name, "dtype": str(dtype).removeprefix("torch.")}
        note(what | {"who": b, "operation": "ten closes give the same bits", "same": same})


def rewind(arenas: DeviceSums) -> bool:
    """Give the arenas the same contents as before, so that a close can be repeated."""
    generator = torch.Generator(arenas.plan.device).manual_seed(0)
    for arena in (arenas.running, arenas.previous, arenas.before):
        arena.normal_(generator=generator)
    return True


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device) -> list[dict[str, Any]]:
    """What the memory system gives to one kernel over flat buffers."""
    n = 2**30 if device.type == "cuda" else 2**24
    a, b = torch.zeros(n, device=device), torch.zeros(n, device=device)
    times = median_times(device, {"copy": lambda: b.copy_(a), "add_": lambda: b.add_(a)})
    moved = {"copy": 8 * n, "add_": 12 * n}
    return [
        {"ceiling": k, "gb_per_s": moved[k] / t["device_us"] / 1e3, **t} for k, t in times.items()
    ]


def share_of_training(device: torch.device) -> dict[str, float]:
    """The whole meter next to a training step of a bf16 transformer of a billion parameters."""
    layer = torch.nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 20, enable_nested_tensor=False)
    model = model.to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(8, 1024, 2048, device=device, dtype=torch.bfloat16)

    def step() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    meter = AngularVelocity(model.parameters(), WINDOW, form="sum")

    def window() -> None:
        for _ in range(WINDOW):
            meter.observe()

    training = median_times(device, {"step": step})["step"]["device_us"]
    metering = median_times(device, {"window": window})["window"]["device_us"] / WINDOW
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_step_us": training,
        "meter_step_us": metering,
        "share_percent": 100 * metering / training,
    }


def check_peers(device: torch.device) -> None:
    for got, wanted in zip(*against_float64(Foreach, device.type), strict=True):
        if abs(got - wanted) > Foreach.accuracy * abs(wanted):
            raise SystemExit(f"a peer is wrong: {got} instead of {wanted}")


def markdown(result: dict[str, Any]) -> str:
    lines = [f"# {result['gpu']}, torch {result['torch']}", ""]
    copy = next(c["gb_per_s"] for c in result["ceilings"] if c["ceiling"] == "copy")
    lines += [
        f"`{c['ceiling']}` on a flat buffer: {c['gb_per_s']:.0f} GB/s  " for c in result["ceilings"]
    ]
    lines += ["", "| shape | dtype | operation | who | device, us | host, us | GB/s | of copy |"]
    lines += ["|:--|:--|:--|:--|--:|--:|--:|--:|"]
    for r in result["rows"]:
        if "device_us" in r:
            lines.append(
                f"| {r['shape']} | {r['dtype']} | {r['operation']} | {r['who']} "
                f"| {r['device_us']:.1f} | {r['host_us']:.1f} | {r['gb_per_s']:.0f} "
                f"| {100 * r['gb_per_s'] / copy:.0f} % |"
            )
    unequal = [r for r in result["rows"] if r.get("same") is False]
    lines += [
        "",
        f"Ten closes gave the same bits: {'no, ' + str(unequal) if unequal else 'always'}.",
    ]
    share = result.get("training")
    if share:
        lines += ["", f"The meter takes {share['share_percent']:.2f} % of a training step."]
    if result["left_out"]:
        lines += ["", f"Left out: {'; '.join(result['left_out'])}."]
    return "\n".join(lines) + "\n"


def give_memory_back(device: torch.device) -> None:
    """Free what the last shape has left, graphs and compiled code included."""
    gc.collect()
    if device.type == "cuda":
        torch._dynamo.reset()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="the two smallest shapes only")
    parser.add_argument("--minutes", type=float, default=9.0, help="then no shape is begun")
    parser.add_argument("--device", default="cuda", help="cpu tries the script without a GPU")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU; on the CPU run: make bench")
    end = time.monotonic() + 60 * arguments.minutes
    device = torch.device(arguments.device, 0 if arguments.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    check_peers(device)
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU",
        "torch": torch.__version__,
        "ceilings": ceilings(device),
        "rows": [],
        "left_out": [],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", result["gpu"].lower()).strip("-")
    with (arguments.output / f"{stem}.jsonl").open("w") as file:

        def note(row: dict[str, Any]) -> None:
            result["rows"].append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()

        for ceiling in result["ceilings"]:
            file.write(json.dumps(ceiling) + "\n")
        names = ("resnet50", "tiny10000") if arguments.quick else SHAPES
        for name in names:
            for dtype in DTYPES:
                if name == "2^31" and dtype is torch.float32:
                    continue  # 34 GB of arenas and 8 of parameters say the same as bf16
                give_memory_back(device)
                what = f"{name} {str(dtype).removeprefix('torch.')}"
                if time.monotonic() > end:
                    result["left_out"].append(f"{what}: time is over")
                    continue
                try:
                    measure(name, dtype, device, note)
                except torch.OutOfMemoryError as error:
                    result["left_out"].append(f"{what}: {str(error).splitlines()[0]}")
        give_memory_back(device)
        if not arguments.quick and time.monotonic() < end:
            result["training"] = share_of_training(device)
            file.write(json.dumps(result["training"]) + "\n")
    (arguments.output / f"{stem}.json").write_text(json.dumps(result, indent=1))
    (arguments.output / f"{stem}.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
