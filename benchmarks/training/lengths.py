"""One setting read at many lengths, against schedules set for each length.

    python benchmarks/training/lengths.py run    [--folder build/lengths] [--cifar10 FOLDER]
    python benchmarks/training/lengths.py report [--folder build/lengths] --to FOLDER

A schedule that knows the end of a run (cosine, linear, exponential, warmup-stable-decay) needs one
run for each length. ``AnytimeAutoDrop``, ``AutoDrop`` and schedule-free train once and are read at
every length, ``AnytimeAutoDrop`` with its averaged and with its last parameters. Runs of one task,
rate and seed start from the same parameters and see the same batches, so that differences to cosine
are paired over seeds.

Nothing is tuned here: the constants of ``AnytimeAutoDrop`` are its defaults, ``AutoDrop`` has the
papers' (k = 64, factor 0.95), exponential falls to 1/100 (on the noisy quadratic, where a fast one
is the best schedule, also further), warmup-stable-decay falls linearly over the last fifth,
schedule-free follows its authors (with SGD at ten times the rate, no warm-up). Rows
are written as they come, and a run that was killed goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from autodrop_ext import AnytimeAutoDrop, AutoDrop

# Run as a file, these folders are not on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from demo.digits import Digits
from demo.text import Bytes

from training.cifar import load_cifar

KNOWN = ("cosine", "linear", "exponential", "wsd")
OPEN = ("anytime", "autodrop", "schedule-free")
NAMES = {
    "anytime": "AnytimeAutoDrop",
    "anytime, last": "AnytimeAutoDrop, last parameters",
    "autodrop": "AutoDrop (k = 64)",
    "schedule-free": "schedule-free",
    "cosine": "cosine, set for each",
    "linear": "linear, set for each",
    "exponential": "exponential to 1/100, set for each",
    "exponential, 1/1000": "exponential to 1/1,000, set for each",
    "exponential, 1/10000": "exponential to 1/10,000, set for each",
    "wsd": "warmup-stable-decay, set for each",
}


class Quadratic:
    """The noisy quadratic of 200 curvatures from 0.1 to 20, gradients ``a (x - z)``, plain SGD."""

    name = "quadratic"
    measure = "loss"
    momentum = 0.0

    def __init__(self) -> None:
        self._curvature = torch.arange(1, 201, dtype=torch.float32) / 10

    def model(self) -> nn.Module:
        """The parameters, which start at 10."""
        model = nn.Module()
        model.register_parameter("x", nn.Parameter(torch.full((200,), 10.0)))
        return model

    def loss(self, model: nn.Module, random: Generator) -> Tensor:
        """Half of ``a (x - z)^2``, with standard normal ``z``."""
        noise = torch.randn(200, generator=random)
        return 0.5 * (self._curvature * (model.x - noise).square()).sum()

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        """The loss without noise."""
        return 0.5 * float((self._curvature * model.x.square()).sum())


class SmallCifar:
    """CIFAR-10 and a convolutional network of 30,000 parameters with batch normalisation.

    Images are moved by up to two pixels, around the edges, and mirrored half of the time. All
    50,000 are trained on in a random order, all 10,000 of the test set measure the error.
    """

    name = "cifar"
    measure = "test error %"
    batch = 32
    weight_decay = 5e-4
    statistics_every = 12  # every 12th training image, as the images may be in order of class

    def __init__(self) -> None:
        data = load_cifar(os.environ["CIFAR10"], 10)
        mean, std = data.train_images.float().mean(), data.train_images.float().std()
        self._images = (data.train_images - mean) / std
        self._test_images = (data.test_images - mean) / std
        self._labels, self._test_labels = data.train_labels, data.test_labels
        self._order = torch.empty(0, dtype=torch.int64)

    def model(self) -> nn.Module:
        """Three convolutions, each with batch normalisation, and a mean over places."""
        self._order = self._order[:0]  # a new run draws its own order
        layers: list[nn.Module] = []
        for inside, outside in ((3, 16), (16, 32), (32, 64)):
            layers += [
                nn.Conv2d(inside, outside, 3, padding=1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def loss(self, model: nn.Module, random: Generator) -> Tensor:
        """Cross entropy of the next batch."""
        if len(self._order) < self.batch:
            self._order = torch.randperm(len(self._labels), generator=random)
        chosen, self._order = self._order[: self.batch], self._order[self.batch :]
        down, right = torch.randint(-2, 3, (2,), generator=random).tolist()
        images = self._images[chosen].roll((down, right), (2, 3))
        if torch.rand((), generator=random) < 0.5:
            images = images.flip(3)
        return nn.functional.cross_entropy(model(images), self._labels[chosen])

    @contextlib.contextmanager
    def statistics(self, model: nn.Module) -> Iterator[None]:
        """Statistics of batch normalisation that belong to the present parameters."""
        before = [buffer.clone() for buffer in model.buffers()]
        some = self._images[:: self.statistics_every].split(500)
        torch.optim.swa_utils.update_bn(some, model)
        yield
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        """Percent of the test images that are taken for something else."""
        model.eval()
        pairs = zip(self._test_images.split(500), self._test_labels.split(500), strict=True)
        wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in pairs)
        model.train()
        return 100 * wrong / len(self._test_labels)


@dataclass(frozen=True)
class Study:
    """What is trained.

    Attributes:
        make: makes the task.
        lengths: optimizer steps at which runs are read.
        seeds: number of seeds by initial rate.
        optimizer: "sgd" or "adamw".
        also: more schedules that are set for each length.
    """

    make: Callable[[], Any]
    lengths: tuple[int, ...]
    seeds: dict[float, int]
    optimizer: str = "sgd"
    also: tuple[str, ...] = ()


STUDIES = {
    "digits": Study(Digits, (300, 1_000, 3_000, 10_000, 30_000), {0.04: 6, 0.02: 3, 0.01: 3}),
    "quadratic": Study(
        Quadratic,
        (1_000, 3_000, 10_000, 30_000),
        {0.06: 3, 0.03: 3, 0.015: 3},
        also=("exponential, 1/1000", "exponential, 1/10000"),
    ),
    "bytes": Study(Bytes, (640, 1_920), {0.006: 3, 0.003: 3, 0.0015: 3}, "adamw"),
    "cifar": Study(SmallCifar, (600, 2_000), {0.05: 3, 0.025: 3, 0.0125: 3}),
}


def train(
    task_name: str, schedule: str, rate: float, seed: int, lengths: tuple[int, ...]
) -> list[dict[str, Any]]:
    """One run, read at each of the lengths; the last of them is its end."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = STUDIES[task_name].make()
    model = task.model()
    random = Generator().manual_seed(seed)
    optimizer, scheduler = _build(task_name, schedule, model, rate, lengths[-1])
    if schedule == "schedule-free":
        optimizer.train()
    rows = []
    begin = time.perf_counter()
    for step in range(1, lengths[-1] + 1):
        loss = task.loss(model, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if step in lengths:
            common = {
                "task": task_name,
                "rate": rate,
                "seed": seed,
                "steps": step,
                "lr": float(optimizer.param_groups[0]["lr"]),
                "seconds": round(time.perf_counter() - begin, 2),
            }
            with _evaluated(schedule, task, model, optimizer, scheduler):
                rows.append({**common, "schedule": schedule, "value": task.quality(model)})
            if schedule == "anytime":
                rows.append({**common, "schedule": "anytime, last", "value": task.quality(model)})
    return rows


def _build(task: str, schedule: str, model: nn.Module, rate: float, steps: int) -> tuple[Any, Any]:
    params, adam = list(model.parameters()), STUDIES[task].optimizer == "adamw"
    momentum = getattr(STUDIES[task].make, "momentum", 0.9)
    decay = getattr(STUDIES[task].make, "weight_decay", 0.0)
    if schedule == "schedule-free":
        import schedulefree

        if adam:
            return schedulefree.AdamWScheduleFree(params, lr=rate), None
        # Its momentum does not multiply the step by 1 / (1 - momentum), as SGD's does.
        lr = rate / (1 - momentum)
        momentum = momentum or 0.9
        sgd = schedulefree.SGDScheduleFree(params, lr=lr, momentum=momentum, weight_decay=decay)
        return sgd, None
    optimizer: Optimizer = (
        torch.optim.AdamW(params, lr=rate, fused=True)
        if adam
        else torch.optim.SGD(params, lr=rate, momentum=momentum, weight_decay=decay, fused=True)
    )
    if schedule == "anytime":
        return optimizer, AnytimeAutoDrop(optimizer)
    if schedule == "autodrop":
        return optimizer, AutoDrop(optimizer)
    share = {
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
        "linear": lambda x: 1 - x,
        "exponential": lambda x: 0.01**x,
        "exponential, 1/1000": lambda x: 0.001**x,
        "exponential, 1/10000": lambda x: 0.0001**x,
        "wsd": lambda x: min(1.0, (1 - x) / 0.2),
    }[schedule]
    return optimizer, lr_scheduler.LambdaLR(optimizer, lambda t: share(min(t / steps, 1.0)))


@contextlib.contextmanager
def _evaluated(
    schedule: str, task: Any, model: nn.Module, optimizer: Any, scheduler: Any
) -> Iterator[None]:
    """The parameters that a schedule offers for evaluation."""
    statistics = getattr(task, "statistics", contextlib.nullcontext)
    if schedule == "schedule-free":
        optimizer.eval()
        with statistics(model):
            yield
        optimizer.train()
    elif schedule == "anytime":
        with scheduler.averaged_parameters(), statistics(model):
            yield
    else:
        yield


def runs(tasks: list[str]) -> list[tuple[str, str, float, int, tuple[int, ...]]]:
    """All runs of the studies: the first rate of each first, seed by seed, short runs first."""
    chosen = []
    for task in tasks:
        study = STUDIES[task]
        for order, (rate, seeds) in enumerate(study.seeds.items()):
            for seed in range(seeds):
                for schedule in (*OPEN, *KNOWN, *study.also):
                    lengths = [study.lengths]
                    if schedule not in OPEN:
                        lengths = [(length,) for length in study.lengths]
                    for of_run in lengths:
                        late = of_run[-1] > 10_000
                        key = (order, seed, late)
                        chosen.append((key, (task, schedule, rate, seed, of_run)))
    return [run for _, run in sorted(chosen, key=lambda item: item[0])]


def run_all(folder: pathlib.Path, tasks: list[str], workers: int, until: float) -> None:
    """Train what is missing; no run starts after ``until`` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    done = {(r["task"], r["schedule"], r["rate"], r["seed"], r["steps"]) for r in read(folder)}
    begin = time.monotonic()
    missing = [
        run for run in runs(tasks) if any((*run[:4], length) not in done for length in run[4])
    ]
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
        path.open("a") as file,
    ):
        waiting: set[concurrent.futures.Future[list[dict[str, Any]]]] = set()
        queue = iter(missing)
        while True:
            while len(waiting) < workers and time.monotonic() - begin < until:
                run = next(queue, None)
                if run is None:
                    break
                waiting.add(pool.submit(train, *run))
            if not waiting:
                return
            ended, waiting = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in ended:
                for row in future.result():
                    file.write(json.dumps(row) + "\n")
                file.flush()


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Rows so far."""
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(folder: pathlib.Path, to: pathlib.Path) -> None:
    """Tables as Markdown and a picture, the tasks and rates in the order of :data:`STUDIES`."""
    to.mkdir(parents=True, exist_ok=True)
    values: dict[tuple[str, float], dict[str, dict[int, dict[int, float]]]] = {}
    for r in read(folder):
        of = values.setdefault((r["task"], r["rate"]), {}).setdefault(r["schedule"], {})
        of.setdefault(r["steps"], {})[r["seed"]] = r["value"]
    lines = [
        "# One setting at many lengths",
        "",
        "Mean over seeds; in brackets the paired difference to cosine with its standard error, and",
        "the number of seeds. Lower is better. `python benchmarks/training/lengths.py`.",
    ]
    for task, rate in ((name, rate) for name in STUDIES for rate in STUDIES[name].seeds):
        if (task, rate) not in values:
            continue
        study, schedules = STUDIES[task], values[task, rate]
        lines += ["", f"## {task}, {study.make.measure}, initial rate {rate:g}", ""]  # type: ignore[attr-defined]
        lines.append("| schedule | " + " | ".join(f"{n:,} steps" for n in study.lengths) + " |")
        lines.append("|:--|" + "--:|" * len(study.lengths))
        for name in NAMES:
            if name in schedules:
                cells = [_cell(schedules, name, steps) for steps in study.lengths]
                lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    (to / "lengths.md").write_text("\n".join(lines) + "\n")
    (to / "rows.jsonl").write_text((folder / "rows.jsonl").read_text())
    _draw(values, to / "lengths.png")


def _cell(schedules: dict[str, dict[int, dict[int, float]]], name: str, steps: int) -> str:
    of_seed = schedules[name].get(steps, {})
    if not of_seed:
        return ""
    text = _three_digits(statistics.mean(of_seed.values()))
    cosine = schedules.get("cosine", {}).get(steps, {})
    pairs = [of_seed[seed] - cosine[seed] for seed in of_seed if seed in cosine]
    if name == "cosine" or len(pairs) < 2:
        return f"{text} ({len(of_seed)})"
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{text} ({statistics.mean(pairs):+.2g} ± {error:.2g}, {len(pairs)})"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _draw(
    values: dict[tuple[str, float], dict[str, dict[int, dict[int, float]]]], path: pathlib.Path
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    columns = max(sum(1 for t, _ in values if t == task) for task in {t for t, _ in values})
    tasks = [task for task in STUDIES if any(t == task for t, _ in values)]
    figure = Figure(figsize=(4 * columns, 3.2 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), columns, squeeze=False)
    handles: dict[str, Any] = {}
    for row, task in zip(axes, tasks, strict=True):
        rates = [rate for rate in STUDIES[task].seeds if (task, rate) in values]
        for ax in row[len(rates) :]:
            ax.set_axis_off()
        for ax, rate in zip(row, rates, strict=False):
            for i, name in enumerate(NAMES):
                points = sorted(values[task, rate].get(name, {}).items())
                if points:
                    means = [statistics.mean(of_seed.values()) for _, of_seed in points]
                    style = "-o" if name.startswith("anytime") else "-." if name in OPEN else "--."
                    (handles[NAMES[name]],) = ax.plot(
                        [n for n, _ in points], means, style, color=f"C{i}", linewidth=1.5
                    )
            ax.set(xscale="log", yscale="log", title=f"{task}, initial rate {rate:g}")
            ax.xaxis.set_major_locator(FixedLocator(STUDIES[task].lengths))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            low, high = ax.get_ylim()
            ax.yaxis.set_major_locator(
                LogLocator(subs=range(1, 10) if high < 4 * low else (1, 2, 5))
            )
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel("optimizer steps")
        row[0].set_ylabel(STUDIES[task].make.measure)  # type: ignore[attr-defined]
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("build/lengths"))
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("build/lengths"))
    parser.add_argument("--task", nargs="+", choices=tuple(STUDIES), default=list(STUDIES))
    parser.add_argument("--cifar10", help="folder of CIFAR-10; without it, that task is left out")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after these")
    options = parser.parse_args()
    if options.cifar10 is not None:
        os.environ["CIFAR10"] = options.cifar10  # for the worker processes too
    elif options.what == "run" and "cifar" in options.task:
        print("cifar is left out: --cifar10 FOLDER names its data (see benchmarks/training.md)")
        options.task.remove("cifar")
    if options.what == "run":
        run_all(options.folder, options.task, options.workers, 60 * options.minutes)
    else:
        report(options.folder, options.to)


if __name__ == "__main__":
    main()
