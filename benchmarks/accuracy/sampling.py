"""How good sampled readings are, on recorded training, and what they cost.

    python benchmarks/accuracy/sampling.py record    [--folder build/sampling] [--only NAME ...]
    python benchmarks/accuracy/sampling.py accuracy  [--folder build/sampling] [--seeds 20]
    python benchmarks/accuracy/sampling.py drops     [--folder build/sampling] [--seeds 20]
    python benchmarks/accuracy/sampling.py cost      [--device cpu] [--shapes transformer60m]

``record`` trains and keeps, for every window, the sums of *every* chunk of 1,024 elements (a meter
that reads all of them, one row each), and what the package's survey found. From these, ``accuracy``
and ``drops`` work out what a sampled meter with any fraction and seed would have read: the choice,
the estimates and their errors are the package's own functions. ``record`` also runs one sampled
meter beside the training and checks that this replay gives its angles.

Runs: the demo's digits network at 256 channels (1.2 million parameters) and as it is (6,000), the
demo's byte transformer at a width of 320 with four layers (5.1 million), each with SGD with
momentum and AdamW, windows of 3 steps, learning rates dropped by an exact AutoDrop.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autodrop_ext import AngularVelocity, AutoDrop
from autodrop_ext.cli.demo.digits import Digits
from autodrop_ext.cli.demo.text import Bytes, ByteTransformer
from autodrop_ext.ops import select
from autodrop_ext.ops.device_sums import Arenas
from autodrop_ext.ops.plan import Plan
from autodrop_ext.sampling.auto import AutoFraction, foreseen
from autodrop_ext.sampling.draw import Choice, Sample, choose, chunk_starts
from autodrop_ext.sampling.error import margin, scatter, squares, standard_error, variances
from autodrop_ext.sampling.survey import Survey, num_windows
from autodrop_ext.schedulers.saturation import SaturationDetector

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "speed"))
import shapes

WINDOW = 3
FRACTIONS = (1 / 64, 1 / 16, 1 / 4)
RUNS: dict[str, tuple[str, str, float, int]] = {
    # task, optimizer, initial rate, windows
    "digits-sgd": ("digits", "sgd", 0.04, 302),
    "digits-adamw": ("digits", "adamw", 0.003, 302),
    "convnet-sgd": ("convnet", "sgd", 0.04, 402),
    "convnet-adamw": ("convnet", "adamw", 0.001, 402),
    "transformer-sgd": ("transformer", "sgd", 0.1, 222),
    "transformer-adamw": ("transformer", "adamw", 0.001, 222),
}


# ---- recording ----------------------------------------------------------------------------------


def task_of(name: str) -> tuple[Any, torch.nn.Module]:
    if name == "transformer":
        text = Bytes()
        text.batch = 4
        return text, ByteTransformer(320, layers=4, heads=4, context=text.context)
    digits = Digits()
    if name == "convnet":
        digits.width = 256
    return digits, digits.model()


def record(name: str, folder: pathlib.Path) -> None:
    """Train one run and store its chunks' sums."""
    task_name, kind, lr, windows = RUNS[name]
    torch.manual_seed(0)
    task, model = task_of(task_name)
    named = [(n, p.detach()) for n, p in model.named_parameters()]
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    scheduler = AutoDrop(optimizer, WINDOW)
    sampled = AngularVelocity(named, WINDOW, sample=FRACTIONS[0], form="delta")
    plan = Plan(named, torch.device("cpu"), sample=Sample(1.0))
    every = Arenas(plan, select("auto", "cpu"))
    survey = Survey([plan], num_windows(plan.num_elements))
    random = torch.Generator().manual_seed(0)
    rows, read = [], []
    for step in range(windows * WINDOW):
        loss = task.loss(model, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % WINDOW == 0 and not survey.done:
            survey.step()
        scheduler.step()
        reading = sampled.observe()
        if step == 0:
            every.begin("delta")
        else:
            every.accumulate(first=step % WINDOW == 0)
        if step % WINDOW == WINDOW - 1:
            every.close(WINDOW)
            if reading is not None:
                rows.append(every.rows[:, :3].copy())
                read.append((reading.angle, reading.standard_error, reading.margin))
    sizes = {f"size {n}": size for n, size in survey.sizes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    assert plan.choice is not None and sampled._reader is not None
    np.savez_compressed(
        folder / f"{name}.npz",
        rows=np.array(rows),
        read=np.array(read),
        dropped=np.array([decision.dropped for decision in scheduler.history]),
        names=np.array([n for n, _ in named]),
        labels=np.array([f"{n}|{tuple(p.shape)} {p.dtype}|()" for n, p in named]),
        lengths=np.array([p.numel() for _, p in named]),
        tensor=plan.choice.tensor,
        survey=num_windows(plan.num_elements),
        **sizes,
    )
    run = load(name, folder)
    error = float(np.abs(replay(run, FRACTIONS[0], 0).angles - np.array(read)[:, 0]).max())
    assert error < 1e-4, f"{name}: the replay is {error} degrees off a real meter"
    print(
        f"{name}: {plan.num_elements:,} parameters, {len(rows)} readings, "
        f"{scheduler.num_drops} drops, final loss {loss.item():.2f}; the replay is "
        f"{error:.1e} degrees off a sampled meter that ran beside",
        flush=True,
    )


# ---- replaying ----------------------------------------------------------------------------------


@dataclass
class Run:
    """A recorded run.

    Attributes:
        rows: sums of every chunk, ``[readings, chunks, 3]``.
        exact: angles, degrees.
        first: of each tensor, its first chunk.
        sized: index of the first reading of a sample that is drawn by the survey.
    """

    name: str
    rows: np.ndarray
    exact: np.ndarray
    lengths: list[int]
    labels: list[str]
    sizes: list[np.ndarray]
    first: np.ndarray
    sized: int

    def chunks_of(self, choice: Choice) -> np.ndarray:
        """Where the chosen chunks stand among all."""
        starts = [chunk_starts(n) for n in self.lengths]
        places = zip(choice.tensor.tolist(), choice.start.tolist(), strict=True)
        return np.array([self.first[t] + np.searchsorted(starts[t], s) for t, s in places])


def load(name: str, folder: pathlib.Path) -> Run:
    with np.load(folder / f"{name}.npz") as data:
        rows = data["rows"]
        names = data["names"].tolist()
        counts = np.bincount(data["tensor"], minlength=len(names))
        total = rows.sum(axis=1)
        return Run(
            name,
            rows,
            angles_of(total),
            data["lengths"].tolist(),
            data["labels"].tolist(),
            [data[f"size {n}"] for n in names],
            np.cumsum(counts) - counts,
            # Shares are compared a window after they were copied, then three windows give an angle;
            # and the first reading, number 0, is that of the third window.
            int(data["survey"]),
        )


def angles_of(sums: np.ndarray) -> np.ndarray:
    cosine = sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 2])
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@dataclass
class Replayed:
    """What a sampled meter read: one value a reading."""

    angles: np.ndarray
    errors: np.ndarray
    margins: np.ndarray
    chunks: int


def replay(run: Run, fraction: float, seed: int, *, survey: bool = True) -> Replayed:
    """Readings of ``AngularVelocity(sample=fraction, seed=seed)``, or of one without a survey."""
    uniform = readings(run, choose(run.lengths, run.labels, Sample(fraction, seed)))
    if not survey:
        return uniform
    sized = readings(run, choose(run.lengths, run.labels, Sample(fraction, seed), run.sizes))
    at = run.sized
    return Replayed(
        *(
            np.concatenate([a[:at], b[at:]])
            for a, b in (
                (uniform.angles, sized.angles),
                (uniform.errors, sized.errors),
                (uniform.margins, sized.margins),
            )
        ),
        chunks=sized.chunks,
    )


def readings(run: Run, choice: Choice) -> Replayed:
    mine = run.rows[:, run.chunks_of(choice)]
    sums = np.einsum("wcs,c->ws", mine, choice.expansion)
    errors, margins = [], []
    for row, (dot, norm, previous) in zip(mine, sums.tolist(), strict=True):
        of_stratum = variances(scatter(row, choice), choice.population, choice.taken)
        products = squares(of_stratum, choice.taken, np.ones(len(of_stratum)))
        total = of_stratum.sum(axis=0)
        errors.append(standard_error(dot, norm, previous, total))
        margins.append(margin(dot, norm, previous, total, products))
    return Replayed(angles_of(sums), np.array(errors), np.array(margins), len(choice.tensor))


def accuracy(run: Run, seeds: int) -> list[dict[str, Any]]:
    """Error, coverage and bias over the readings that are drawn by the survey, and without it."""
    table = []
    for fraction in FRACTIONS:
        for survey in (True, False):
            every = [replay(run, fraction, seed, survey=survey) for seed in range(seeds)]
            late = slice(run.sized, None)
            errors = np.array([r.angles[late] - run.exact[late] for r in every])
            reported = np.array([r.errors[late] for r in every])
            inside = np.abs(errors) <= np.array([r.margins[late] for r in every])
            of_seed = errors.mean(axis=1)
            table.append(
                {
                    "run": run.name,
                    "fraction": fraction,
                    "survey": survey,
                    "readings": errors.shape[1],
                    "chunks": every[0].chunks,
                    "of": run.rows.shape[1],
                    "error": float(np.sqrt((errors**2).mean())),
                    "reported": float(np.sqrt((reported**2).mean())),
                    "coverage": float(inside.mean()),
                    "worst_seed": float(inside.mean(axis=1).min()),
                    "bias": float(of_seed.mean()),
                    "bias_error": float(of_seed.std(ddof=1) / math.sqrt(seeds)),
                }
            )
    return table


def drops_of(angles: np.ndarray, threshold: float, switches: dict[int, float]) -> list[int]:
    """Readings at which AutoDrop lowers the rate, with its defaults.

    Args:
        angles: degrees.
        threshold: degrees.
        switches: readings that are the first of another sample, and the margins there, degrees.
    """
    detector = SaturationDetector(threshold, 10, 10, "value")
    found = []
    for i, angle in enumerate(angles.tolist()):
        if i in switches:
            detector.leave(angle, switches[i])
        if detector.update(angle).saturated:
            found.append(i)
    return found


def margins_at(read: Replayed, at: int) -> dict[int, float]:
    return {at: float(read.margins[at] + read.margins[at - 1])}


def auto_angles(
    run: Run, tolerance: float, seed: int
) -> tuple[np.ndarray, dict[int, float], float]:
    """Angles of ``sample="auto"``, its switches, and the fraction that it settles on."""
    auto = AutoFraction(tolerance)
    fraction = auto.start(sum(run.lengths))
    if auto.chosen is not None:
        return run.exact, {}, 1.0
    pilot = replay(run, fraction, seed)
    choice = choose(run.lengths, run.labels, Sample(fraction, seed), run.sizes)
    at = run.chunks_of(choice)
    switches = margins_at(pilot, run.sized)
    for i in range(run.sized, len(run.rows)):
        row = run.rows[i, at]
        sums = (row * choice.expansion[:, None]).sum(axis=0).tolist()
        ahead = foreseen(scatter(row, choice), choice, fraction, np.ones(len(choice.taken)))
        if auto.take(sums, ahead.tolist()) is not None:
            break
    assert auto.chosen is not None
    settled = i + 3
    if auto.chosen == fraction:
        return pilot.angles, switches, fraction
    if auto.chosen == 1:
        later, margin = run.exact, 0.0
    else:
        finer = replay(run, auto.chosen, seed)
        later, margin = finer.angles, float(finer.margins[settled])
    switches[settled] = margin + float(pilot.margins[settled - 1])
    return np.concatenate([pilot.angles[:settled], later[settled:]]), switches, auto.chosen


def drops(run: Run, seeds: int) -> list[dict[str, Any]]:
    """Whether the same angles, sampled, lead to the same drops: detectors on recorded angles."""
    table = []
    for threshold in (0.1, 1.0, 5.0):
        wanted = drops_of(run.exact, threshold, {})
        for sample in ("auto", *FRACTIONS):
            same, made, chosen = [], [], []
            for seed in range(seeds):
                if sample == "auto":
                    angles, switches, fraction = auto_angles(run, threshold / 10, seed)
                else:
                    fraction = float(sample)
                    fixed = replay(run, fraction, seed)
                    angles, switches = fixed.angles, margins_at(fixed, run.sized)
                found = drops_of(angles, threshold, switches)
                near = [any(abs(d - w) <= 1 for d in found) for w in wanted]
                same.append(sum(near) / max(len(wanted), 1))
                made.append(len(found))
                chosen.append(fraction)
            table.append(
                {
                    "run": run.name,
                    "threshold": threshold,
                    "sample": sample,
                    "chosen": sorted(set(chosen)),
                    "drops": len(wanted),
                    "sampled_drops": statistics.mean(made),
                    "same": statistics.mean(same),
                }
            )
    return table


# ---- cost ---------------------------------------------------------------------------------------


def llama8b() -> list[tuple[int, ...]]:
    """A decoder of 8.0 billion parameters: 32 layers of width 4,096, grouped heads, 291 tensors."""
    width, inner, small, vocabulary = 4096, 14336, 1024, 128_256
    layer: list[tuple[int, ...]] = [(width, width), (small, width), (small, width), (width, width)]
    layer += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(vocabulary, width), *(32 * layer), (width,), (vocabulary, width)]


def cost(device: str, which: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Times of a step and of a close, exact and sampled in turns, and memory."""
    made = llama8b() if which == "llama8b" else shapes.SHAPES[which]()
    params = [torch.full(s, 0.5, dtype=dtype, device=device) for s in made]
    elements = sum(p.numel() for p in params)
    plain: dict[str, int | None] = {"exact": None, "1/16": 16, "1/64": 64}
    arenas = {}
    for name, part in plain.items():
        sample = None if part is None else Sample(1 / part)
        plan = Plan([(f"t{i}", p) for i, p in enumerate(params)], params[0].device, sample=sample)
        arenas[name] = Arenas(plan, select("auto", params[0].device.type))
        arenas[name].begin("sum")

    def seconds(work: Any) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    times: dict[str, dict[str, list[float]]] = {n: {"step": [], "close": []} for n in plain}
    flush = torch.zeros(64 << 20, device=device)  # 256 MiB: nothing stays in a cache in between
    for _ in range(repeats + 2):
        for name, mine in arenas.items():
            flush.add_(1.0)
            times[name]["step"].append(seconds(lambda mine=mine: mine.accumulate(first=False)))
            flush.add_(1.0)
            times[name]["close"].append(seconds(lambda mine=mine: mine.close(64)))
    load = f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads"
    where = load if device == "cpu" else torch.cuda.get_device_name()
    result: dict[str, Any] = {"shapes": which, "dtype": str(dtype), "elements": elements}
    result["where"] = where
    for name, both in times.items():
        result[name] = {key: statistics.median(values[2:]) for key, values in both.items()}
        plan = arenas[name].plan
        result[name]["bytes"] = 12 * plan.arena_elements / elements
        result[name]["chunks"] = plan.num_chunks
    return result


# ---- tables -------------------------------------------------------------------------------------


def print_accuracy(table: list[dict[str, Any]], *, head: bool) -> None:
    if head:
        print("| run | part | survey | chunks | error | reported | in the 95 % interval | bias |")
        print("|:--|--:|:--|--:|--:|--:|--:|--:|")
    for row in table:
        print(
            f"| {row['run']} | 1/{1 / row['fraction']:.0f} | {'yes' if row['survey'] else 'no'} "
            f"| {row['chunks']:,} of {row['of']:,} | {row['error']:.2f}° | {row['reported']:.2f}° "
            f"| {row['coverage']:.1%} (worst seed {row['worst_seed']:.0%}) "
            f"| {row['bias']:+.3f} ± {row['bias_error']:.3f}° |",
            flush=True,
        )


def print_drops(table: list[dict[str, Any]], *, head: bool) -> None:
    if head:
        print("| run | threshold | sample | part read | drops, exact | drops, sampled | same |")
        print("|:--|--:|:--|:--|--:|--:|--:|")
    for row in table:
        sample = row["sample"] if row["sample"] == "auto" else f"1/{1 / row['sample']:.0f}"
        chosen = ", ".join("all" if f == 1 else f"1/{1 / f:.0f}" for f in row["chosen"])
        print(
            f"| {row['run']} | {row['threshold']:g}° | {sample} | {chosen} | {row['drops']} "
            f"| {row['sampled_drops']:.1f} | {row['same']:.0%} |",
            flush=True,
        )


def print_cost(result: dict[str, Any]) -> None:
    elements = f"{result['elements']:,} elements"
    print(f"{result['shapes']}, {result['dtype']}, {elements} on {result['where']}\n")
    print("| | bytes a parameter | chunks | a step, ms | of exact | a close, ms | of exact |")
    print("|:--|--:|--:|--:|--:|--:|--:|")
    exact = result["exact"]
    for name in ("exact", "1/16", "1/64"):
        row = result[name]
        print(
            f"| {name} | {row['bytes']:.3f} | {row['chunks']:,} | {1e3 * row['step']:.3f} "
            f"| 1/{exact['step'] / row['step']:.1f} | {1e3 * row['close']:.3f} "
            f"| 1/{exact['close'] / row['close']:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["record", "accuracy", "drops", "cost"])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("build/sampling"))
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", choices=[*shapes.SHAPES, "llama8b"], default="transformer60m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=pathlib.Path, help="a file, or a folder to name one in")
    arguments = parser.parse_args()
    results: Any = []
    if arguments.command == "cost":
        dtype = getattr(torch, arguments.dtype)
        results = cost(arguments.device, arguments.shapes, dtype, arguments.repeats)
        print_cost(results)
    elif arguments.command == "record":
        torch.set_num_threads(1)
        for name in arguments.only:
            record(name, arguments.folder)
    else:
        logging.disable(logging.WARNING)  # what sample="auto" says of each seed
        make, show = (
            (accuracy, print_accuracy) if arguments.command == "accuracy" else (drops, print_drops)
        )
        for name in arguments.only:
            table = make(load(name, arguments.folder), arguments.seeds)
            show(table, head=not results)
            results += table
    if arguments.json:
        path = arguments.json
        if path.is_dir():
            hardware = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name()
            path /= f"{hardware.replace(' ', '-')}-sampling-{arguments.command}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
