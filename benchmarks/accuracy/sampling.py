"""How good sampled readings are, on recorded training, and what they cost.

    python benchmarks/accuracy/sampling.py record    [--folder build/sampling] [--only NAME ...]
    python benchmarks/accuracy/sampling.py accuracy  [--folder build/sampling] [--seeds 20]
    python benchmarks/accuracy/sampling.py drops     [--folder build/sampling] [--seeds 20]
    python benchmarks/accuracy/sampling.py sparse    [--folder build/sampling] [--first 100]
    python benchmarks/accuracy/sampling.py cost      [--device cpu] [--shapes transformer60m]

``record`` trains and keeps, for every window, the sums of *every* chunk of 1,024 elements (a meter
that reads all of them, one row each), and what the package's survey found. From these, ``accuracy``
and ``drops`` work out what a sampled meter with any fraction and seed would have read: the draw,
the estimates and their errors are the package's own functions. ``record`` also runs one sampled
meter along with the training and checks that this replay gives its angles.

``sparse`` moves a few rows of an embedding of 50,000 rows of 64 in every window, others in each,
with and without a dense part that moves as a whole, and asks how often the 95 % interval holds the
exact angle, where a reading has one.

Runs: the demo's digits network at 256 channels (1.2 million parameters) and as it is (6,000), the
demo's byte transformer at a width of 320 with four layers (5.1 million), each with SGD with
momentum and AdamW, windows of 3 steps, learning rates dropped by an exact AutoDrop.
"""

from __future__ import annotations

import argparse
import itertools
import json
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
from autodrop_ext.angle import FREEDOM_A_MOVER, movers, standard_error
from autodrop_ext.ops import select
from autodrop_ext.ops.device_sums import DeviceSums
from autodrop_ext.ops.plan import Plan, Ranges
from autodrop_ext.sampling.draw import DrawnChunks, Sample, chunk_starts, draw
from autodrop_ext.sampling.error import margin, scatter, squares, variances
from autodrop_ext.sampling.survey import Survey, num_windows
from autodrop_ext.sampling.wandering import Wandering
from autodrop_ext.schedulers.saturation import SaturationDetector

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "speed"))
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
import shapes
from demo.digits import Digits
from demo.text import Bytes, ByteTransformer

CPU = torch.device("cpu")
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


class EveryChunk:
    """The sums of every chunk of some tensors, window by window, and a survey of them.

    Args:
        named: names and tensors, on the CPU.
    """

    def __init__(self, named: list[tuple[str, torch.Tensor]]) -> None:
        lengths, names = [t.numel() for _, t in named], [name for name, _ in named]
        self.drawn = draw(lengths, names, Sample(1.0))
        ranges = Ranges(
            self.drawn.tensor, self.drawn.start, self.drawn.length, self.drawn.expansion
        )
        self._sums = DeviceSums(Plan(named, CPU, ranges=ranges), select("auto", CPU))
        whole = Plan(named, CPU)
        self.windows = num_windows(whole.num_elements)
        self._survey = Survey([whole], self.windows)
        self._named = named
        self.rows: list[np.ndarray] = []

    def observe(self, step: int) -> None:
        """After each optimizer step, counted from 0."""
        if step % WINDOW == 0 and not self._survey.done:
            self._survey.step()
        if step == 0:
            self._sums.begin("delta")
        else:
            self._sums.add(first=step % WINDOW == 0)
        if step % WINDOW == WINDOW - 1:
            self._sums.close(WINDOW)
            if step >= 3 * WINDOW - 1:
                self.rows.append(self._sums.rows()[:, :3].copy())

    def save(self, path: pathlib.Path, **more: Any) -> None:
        """Store the sums and the motion."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            rows=np.array(self.rows),
            names=np.array([n for n, _ in self._named]),
            labels=np.array([f"{n}|{tuple(p.shape)} {p.dtype}|()" for n, p in self._named]),
            lengths=np.array([p.numel() for _, p in self._named]),
            tensor=self.drawn.tensor,
            survey=self.windows,
            **{f"motion {n}": moved for n, moved in self._survey.motion.items()},
            **more,
        )


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
    every = EveryChunk(named)
    random = torch.Generator().manual_seed(0)
    for step in range(windows * WINDOW):
        loss = task.loss(model, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        sampled.observe()
        every.observe(step)
    read = np.array([(r.angle, r.standard_error, r.margin) for r in sampled.history], float)
    every.save(folder / f"{name}.npz", read=read)
    error = check_replay(name, folder, read)
    print(
        f"{name}: {sum(p.numel() for _, p in named):,} parameters, {len(every.rows)} readings, "
        f"{scheduler.num_drops} drops, final loss {loss.item():.2f}; the replay is "
        f"{error:.1e} degrees off a sampled meter that ran along",
        flush=True,
    )


def check_replay(
    name: str, folder: pathlib.Path, read: np.ndarray, fraction: float = FRACTIONS[0]
) -> float:
    """Largest difference, in degrees, of the replay to a sampled meter that ran along."""
    run = load(name, folder)
    mine = replay(run, fraction, 0)
    late = read[-(len(run.rows) - run.surveyed) :]
    angles = mine.angles[run.surveyed :]
    assert (np.isnan(angles) == np.isnan(late[:, 0])).all(), f"{name}: other readings are undefined"
    error = float(np.nanmax(np.abs(angles - late[:, 0]), initial=0.0))
    assert error < 1e-4, f"{name}: the replay is {error} degrees off a real meter"
    known = mine.known[run.surveyed :]
    assert (known == np.isfinite(late[:, 1])).all(), f"{name}: other readings have no error"
    return error


# ---- replaying ----------------------------------------------------------------------------------


@dataclass
class Run:
    """A recorded run.

    Attributes:
        rows: sums of every chunk, ``[readings, chunks, 3]``.
        exact: angles, degrees.
        motion: what the survey found, for each tensor.
        first: first chunk of each tensor.
        surveyed: index of the first reading that a sampled meter has.
    """

    name: str
    rows: np.ndarray
    exact: np.ndarray
    lengths: list[int]
    labels: list[str]
    motion: list[np.ndarray]
    first: np.ndarray
    surveyed: int

    def chunks_of(self, drawn: DrawnChunks) -> np.ndarray:
        """Where the drawn chunks stand among all."""
        starts = [chunk_starts(n) for n in self.lengths]
        places = zip(drawn.tensor.tolist(), drawn.start.tolist(), strict=True)
        return np.array([self.first[t] + np.searchsorted(starts[t], s) for t, s in places])


def load(name: str, folder: pathlib.Path) -> Run:
    with np.load(folder / f"{name}.npz") as data:
        rows = data["rows"]
        names = data["names"].tolist()
        counts = np.bincount(data["tensor"], minlength=len(names))
        return Run(
            name,
            rows,
            angles_of(rows.sum(axis=1)),
            data["lengths"].tolist(),
            data["labels"].tolist(),
            [data[f"motion {n}"] for n in names],
            np.cumsum(counts) - counts,
            # Three windows give an angle; reading number 0 of the exact meter is that of the third.
            int(data["survey"]),
        )


def angles_of(sums: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):  # nothing that was read has moved
        cosine = sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 2])
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@dataclass
class Replayed:
    """What a sampled meter read: one value a reading.

    Attributes:
        known: whether the reading has its error and margin; the meter gives NaN where it has not.
    """

    angles: np.ndarray
    errors: np.ndarray
    margins: np.ndarray
    known: np.ndarray
    chunks: int


def replay(run: Run, fraction: float, seed: int, *, survey: bool = True) -> Replayed:
    """Readings of ``AngularVelocity(sample=fraction, seed=seed)``, or of one without a survey."""
    sample = Sample(fraction, seed)
    drawn = draw(run.lengths, run.labels, sample, run.motion if survey else None)
    mine = run.rows[:, run.chunks_of(drawn)]
    sums = np.einsum("wcs,c->ws", mine, drawn.expansion)
    wandering = Wandering(drawn, run.motion)
    errors, margins, known = [], [], []
    for row, (dot, norm, previous) in zip(mine, sums.tolist(), strict=True):
        covariances = variances(scatter(row, drawn), drawn.population, drawn.taken)
        products = squares(covariances, drawn.taken, np.ones(len(covariances)))
        total = covariances.sum(axis=0).tolist()
        count: float | None = math.inf
        if survey:
            count = movers(wandering.table(row).sum(axis=0).tolist())
        freedom = math.inf if count is None else FREEDOM_A_MOVER * count
        errors.append(standard_error(dot, norm, previous, total))
        margins.append(margin(dot, norm, previous, total, products.tolist(), freedom))
        known.append(count is not None and errors[-1] > 0)
    return Replayed(
        angles_of(sums), np.array(errors), np.array(margins), np.array(known), len(drawn.tensor)
    )


def accuracy(run: Run, seeds: int) -> list[dict[str, Any]]:
    """Error, coverage and bias over the readings, and what they were without the survey."""
    table = []
    for fraction in FRACTIONS:
        for survey in (True, False):
            every = [replay(run, fraction, seed, survey=survey) for seed in range(seeds)]
            late = slice(run.surveyed, None)
            errors = np.array([r.angles[late] - run.exact[late] for r in every])
            reported = np.array([r.errors[late] for r in every])
            inside = np.abs(errors) <= np.array([r.margins[late] for r in every])
            known = np.array([r.known[late] for r in every])
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
                    "known": float(known.mean()),
                    "coverage": float(inside.mean()),
                    "worst_seed": float(inside.mean(axis=1).min()),
                    "bias": float(of_seed.mean()),
                    "bias_error": float(of_seed.std(ddof=1) / math.sqrt(seeds)),
                }
            )
    return table


def drops_of(angles: np.ndarray, threshold: float) -> list[int]:
    """Readings at which AutoDrop lowers the rate, with its defaults.

    Args:
        angles: degrees.
        threshold: degrees.
    """
    detector = SaturationDetector(threshold, 10, 10, "value")
    return [i for i, angle in enumerate(angles.tolist()) if detector.update(angle).saturated]


def drops(run: Run, seeds: int) -> list[dict[str, Any]]:
    """Whether the same angles, sampled, lead to the same drops: detectors on recorded angles."""
    table = []
    exact = run.exact[run.surveyed :]
    for threshold in (0.1, 1.0, 5.0):
        wanted = drops_of(exact, threshold)
        for fraction in FRACTIONS:
            same, made = [], []
            for seed in range(seeds):
                found = drops_of(replay(run, fraction, seed).angles[run.surveyed :], threshold)
                near = [any(abs(d - w) <= 1 for d in found) for w in wanted]
                same.append(sum(near) / max(len(wanted), 1))
                made.append(len(found))
            table.append(
                {
                    "run": run.name,
                    "threshold": threshold,
                    "fraction": fraction,
                    "drops": len(wanted),
                    "sampled_drops": statistics.mean(made),
                    "same": statistics.mean(same),
                }
            )
    return table


# ---- few rows that move -------------------------------------------------------------------------

ROWS, WIDTH = 50_000, 64
DENSE = (500, 1024)
SPARSE: dict[str, tuple[float, str]] = {
    # motion of the dense part relative to that of the embedding, which rows move
    "none": (0.0, "others"),
    "as far": (1.0, "others"),
    "4 times": (4.0, "others"),
    "19 times": (19.0, "others"),
    "none, all rows decay": (0.0, "others and decay"),
    "none, the same rows": (0.0, "the same"),
}
SHARES = (0.001, 0.003, 0.01, 0.1)


def record_sparse(setting: str, share: float, seed: int, folder: pathlib.Path) -> str:
    """Move an embedding and store its chunks' sums; the name of the recording."""
    dense_motion, which = SPARSE[setting]
    random = torch.Generator().manual_seed(seed)
    embedding = torch.randn(ROWS, WIDTH, generator=random)
    named = [("embedding", embedding)]
    moving = round(share * ROWS / WINDOW)  # in a step
    if dense_motion:
        dense = torch.randn(DENSE, generator=random)
        drift = torch.randn(DENSE, generator=random)
        # Chunks move by different lengths, and drift as far in a window as noise takes them.
        scale = torch.exp(0.7 * torch.randn(DENSE[0], 1, generator=random))
        of_step = dense_motion * moving * WIDTH / (dense.numel() * float(scale.square().mean()))
        scale *= math.sqrt(of_step / 2)
        named.append(("dense", dense))
    same = torch.randperm(ROWS, generator=random)[: WINDOW * moving]
    every = EveryChunk(named)
    sampled = AngularVelocity(named, WINDOW, sample=FRACTIONS[1], form="delta")
    for step in range(WINDOW * (every.windows + 3 + 20)):
        if which == "the same":
            rows = same[torch.randperm(len(same), generator=random)[:moving]]
        else:
            rows = torch.randperm(ROWS, generator=random)[:moving]
        if which == "others and decay":
            embedding *= 1 - 1e-4
        embedding[rows] += torch.randn(moving, WIDTH, generator=random)
        if dense_motion:
            noise = torch.randn(DENSE, generator=random)
            dense += scale * (drift / math.sqrt(WINDOW) + noise)
        every.observe(step)
        sampled.observe()
    name = f"sparse {setting} {share:g} {seed}"
    every.save(folder / f"{name}.npz")
    read = np.array([(r.angle, r.standard_error, r.margin) for r in sampled.history], float)
    check_replay(name, folder, read, FRACTIONS[1])
    return name


def sparse(
    setting: str, share: float, seeds: int, first: int, folder: pathlib.Path
) -> list[dict[str, Any]]:
    """How often a reading has an interval, and how often that holds the exact angle.

    Three recordings, of the seeds from ``first`` on, and ``seeds`` samples of each.
    """
    recorded = range(first, first + 3)
    drawn = range(first, first + seeds)
    runs = [load(record_sparse(setting, share, seed, folder), folder) for seed in recorded]
    table = []
    for fraction in FRACTIONS:
        pairs = [(run, replay(run, fraction, seed)) for run in runs for seed in drawn]
        late = slice(runs[0].surveyed, None)
        errors = np.concatenate([r.angles[late] - run.exact[late] for run, r in pairs])
        inside = np.abs(errors) <= np.concatenate([r.margins[late] for _, r in pairs])
        known = np.concatenate([r.known[late] for _, r in pairs])
        reported = np.concatenate([r.errors[late] for _, r in pairs])
        table.append(
            {
                "dense": setting,
                "share": share,
                "fraction": fraction,
                "readings": len(known),
                "chunks": pairs[0][1].chunks,
                "known": float(known.mean()),
                "coverage": float(inside[known].mean()) if known.any() else None,
                "coverage_if_all_were_known": float(inside.mean()),
                "error": float(np.sqrt((errors[known] ** 2).mean())) if known.any() else None,
                "reported": float(np.sqrt((reported[known] ** 2).mean())) if known.any() else None,
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
    named = [(f"t{i}", p) for i, p in enumerate(params)]
    sums = {}
    for name, part in plain.items():
        ranges = None
        if part is not None:
            drawn = draw([p.numel() for p in params], [n for n, _ in named], Sample(1 / part))
            ranges = Ranges(drawn.tensor, drawn.start, drawn.length, drawn.expansion)
        plan = Plan(named, params[0].device, ranges=ranges)
        sums[name] = DeviceSums(plan, select("auto", params[0].device))
        sums[name].begin("sum")

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
        for name, mine in sums.items():
            flush.add_(1.0)
            times[name]["step"].append(seconds(lambda mine=mine: mine.add(first=False)))
            flush.add_(1.0)
            times[name]["close"].append(seconds(lambda mine=mine: mine.close(64)))
    load = f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads"
    where = load if device == "cpu" else torch.cuda.get_device_name()
    result: dict[str, Any] = {"shapes": which, "dtype": str(dtype), "elements": elements}
    result["where"] = where
    for name, both in times.items():
        result[name] = {key: statistics.median(values[2:]) for key, values in both.items()}
        plan = sums[name].plan
        result[name]["bytes"] = 12 * plan.arena_elements / elements
        result[name]["chunks"] = plan.num_chunks
    return result


# ---- tables -------------------------------------------------------------------------------------


def print_accuracy(table: list[dict[str, Any]], *, head: bool) -> None:
    if head:
        print("| run | part | survey | chunks | known | error | reported | in 95 % | bias |")
        print("|:--|--:|:--|--:|--:|--:|--:|--:|--:|")
    for row in table:
        print(
            f"| {row['run']} | 1/{1 / row['fraction']:.0f} | {'yes' if row['survey'] else 'no'} "
            f"| {row['chunks']:,} of {row['of']:,} | {row['known']:.0%} "
            f"| {row['error']:.2f}° | {row['reported']:.2f}° "
            f"| {row['coverage']:.1%} (worst seed {row['worst_seed']:.0%}) "
            f"| {row['bias']:+.3f} ± {row['bias_error']:.3f}° |",
            flush=True,
        )


def print_sparse(table: list[dict[str, Any]], *, head: bool) -> None:
    if head:
        print("| dense part | rows that move | part | known | in the interval | of all | error |")
        print("|:--|--:|--:|--:|--:|--:|--:|")
    for row in table:
        known = row["coverage"] is not None
        inside = f"{row['coverage']:.1%}" if known else ""
        error = f"{row['error']:.2f}° ({row['reported']:.2f}°)" if known else ""
        print(
            f"| {row['dense']} | {row['share']:.1%} | 1/{1 / row['fraction']:.0f} "
            f"| {row['known']:.1%} | {inside} | {row['coverage_if_all_were_known']:.0%} "
            f"| {error} |",
            flush=True,
        )


def print_drops(table: list[dict[str, Any]], *, head: bool) -> None:
    if head:
        print("| run | threshold | part | drops, exact | drops, sampled | same |")
        print("|:--|--:|--:|--:|--:|--:|")
    for row in table:
        print(
            f"| {row['run']} | {row['threshold']:g}° | 1/{1 / row['fraction']:.0f} "
            f"| {row['drops']} | {row['sampled_drops']:.1f} | {row['same']:.0%} |",
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
    parser.add_argument("command", choices=["record", "accuracy", "drops", "sparse", "cost"])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("build/sampling"))
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="first seed of sparse")
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
    elif arguments.command == "sparse":
        torch.set_num_threads(1)
        for setting, share in itertools.product(SPARSE, SHARES):
            table = sparse(setting, share, arguments.seeds, arguments.first, arguments.folder)
            print_sparse(table, head=not results)
            results += table
    else:
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
