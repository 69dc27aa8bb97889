"""One setting read at many lengths, against schedules set for each length.

    python benchmarks/training/lengths.py plan   [--folder build/lengths] [--cifar10 FOLDER]
    python benchmarks/training/lengths.py run    [--folder build/lengths] [--cifar10 FOLDER]
    python benchmarks/training/lengths.py report [--folder build/lengths] --to FOLDER

A schedule that knows the end of a run (cosine, linear, exponential, warmup-stable-decay) needs one
run for each length. The others train once and are read at every length. Runs of one task, rate and
seed start from the same parameters and see the same batches, so that differences are paired over
seeds.

Nothing is tuned here. ``AnytimeAutoDrop`` has its defaults; once without a warm-up, once with a
linear one of 200 steps, and once with the automatic one. A constant rate and ``sqrt(a / (t + a))``
after ``t`` steps, with ``a`` 100 and 300, have the average of ``AnytimeAutoDrop`` (``kappa=8``,
``ParameterAverage`` moved at the same steps), and no meter. Cosine and linear are read with their
last parameters and with the same average. Schedule-free follows its authors: with SGD at ten times
the rate. All of them and cosine are also run with the linear warm-up of 200 steps, after which
their ``t``, their averages and their lengths begin, also where a run has 300 steps only.
``AutoDrop`` has the papers' settings (k = 64, factor 0.95), exponential falls to 1/100 (on the
noisy quadratic, where a fast one is the best schedule, also further), warmup-stable-decay falls
linearly over the last fifth.

ScheduleFree+ is missing: version 1.4.1 of schedulefree, the newest that can be installed, does not
have it, and the research code of its repository is an AdamC whose step takes the loss.

Rows are written as they come, the most important runs first, and a run that was killed goes on with
those that are missing. A run ends at its first loss that is not finite; its values are null then.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Generator, nn
from torch.optim import Optimizer, lr_scheduler

from autodrop_ext import AnytimeAutoDrop, AutoDrop

# Run as a file, these folders are not on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from demo.training import Average

from training.regret import read, report
from training.studies import AUTO, OPEN, STUDIES, WARM_UP, WARMED

WARM_UP_STEPS = 200
KNOWN = ("cosine", "cosine" + WARM_UP)
OTHERS = ("linear", "autodrop", "wsd", "exponential")
STAGES = (
    "without a plain warm-up, seeds 0 to 2",
    "the same, more seeds",
    "with the plain warm-up, seeds 0 to 2",
    "the same, more seeds",
    "other schedules",
)

_SHARES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "exponential": lambda x: 0.01**x,
    "exponential, 1/1000": lambda x: 0.001**x,
    "exponential, 1/10000": lambda x: 0.0001**x,
    "wsd": lambda x: min(1.0, (1 - x) / 0.2),
}


class Run(NamedTuple):
    """Arguments of :func:`train`."""

    task: str
    schedule: str
    rate: float
    seed: int
    lengths: tuple[int, ...]


@functools.lru_cache(maxsize=1)
def _task(name: str) -> Any:
    return STUDIES[name].make()


def train(
    task_name: str, schedule: str, rate: float, seed: int, lengths: tuple[int, ...]
) -> list[dict[str, Any]]:
    """One run, read at each of the lengths; the last of them is its end."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = STUDIES[task_name].onednn
    task = _task(task_name)
    torch.manual_seed(seed)
    model = task.model()
    random = Generator().manual_seed(seed)
    warm_up = WARM_UP_STEPS if schedule.endswith(WARM_UP) else 0
    optimizer, scheduler = make_schedule(task_name, schedule, model, rate, lengths[-1], warm_up)
    average = Average(model) if _averages(schedule) else None
    rows: list[dict[str, Any]] = []
    seconds, begin = 0.0, time.process_time()
    diverged = False
    for step in range(1, lengths[-1] + 1):
        if not diverged:
            loss = task.loss(model, random)
            optimizer.zero_grad()
            diverged = not math.isfinite(loss.item())
        if not diverged:
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if average is not None:
                average.step(step - warm_up)
        if step in lengths:
            seconds += time.process_time() - begin
            common = {
                "task": task_name,
                "rate": rate,
                "seed": seed,
                "steps": step,
                "lr": float(optimizer.param_groups[0]["lr"]),
                "seconds": round(seconds, 3),
            }
            for name, parameters in _evaluated(
                schedule, task, model, optimizer, scheduler, average
            ):
                value = math.nan
                if not diverged:
                    with parameters:
                        value = task.quality(model)
                finite = value if math.isfinite(value) else None
                rows.append({**common, "schedule": name, "value": finite})
            begin = time.process_time()
    return rows


def _averages(schedule: str) -> bool:
    return "+average" in schedule or schedule.startswith(("cosine", "linear"))


def make_schedule(
    task: str, schedule: str, model: nn.Module, rate: float, steps: int, warm_up: int
) -> tuple[Any, Any]:
    """Return the optimizer of a task and the scheduler, if there is one."""
    params, adam = list(model.parameters()), STUDIES[task].optimizer == "adamw"
    momentum = getattr(STUDIES[task].make, "momentum", 0.9)
    decay = getattr(STUDIES[task].make, "weight_decay", 0.0)
    name = schedule.removesuffix(WARM_UP)
    if name == "schedule-free":
        import schedulefree

        if adam:
            own = schedulefree.AdamWScheduleFree(params, lr=rate, warmup_steps=warm_up)
        else:
            # Its momentum does not multiply the step by 1 / (1 - momentum), as SGD's does.
            own = schedulefree.SGDScheduleFree(
                params,
                lr=rate / (1 - momentum),
                momentum=momentum or 0.9,
                weight_decay=decay,
                warmup_steps=warm_up,
            )
        own.train()
        return own, None
    optimizer: Optimizer = (
        torch.optim.AdamW(params, lr=rate, fused=True)
        if adam
        else torch.optim.SGD(params, lr=rate, momentum=momentum, weight_decay=decay, fused=True)
    )
    if schedule == AUTO:
        warmup_steps: Any = "auto"
        return optimizer, AnytimeAutoDrop(optimizer, warmup_steps=warmup_steps)
    if name == "anytime":
        return optimizer, AnytimeAutoDrop(optimizer, warmup_steps=warm_up)
    if name == "autodrop":
        return optimizer, AutoDrop(optimizer)
    after = _after_warm_up(name, max(1, steps - warm_up))

    def factor(t: int) -> float:
        return (t + 1) / warm_up if t < warm_up else after(t - warm_up)

    return optimizer, lr_scheduler.LambdaLR(optimizer, factor)


def _after_warm_up(name: str, steps: int) -> Callable[[int], float]:
    """The rate over the initial one, after a number of optimizer steps."""
    if name == "constant+average":
        return lambda t: 1.0
    if name.startswith("sqrt"):
        a = int(name.removeprefix("sqrt").removesuffix("+average"))
        return lambda t: math.sqrt(a / (t + a))
    share = _SHARES[name]
    return lambda t: share(min(t / steps, 1.0))


def _evaluated(
    schedule: str, task: Any, model: nn.Module, optimizer: Any, scheduler: Any, average: Any
) -> Iterator[tuple[str, Any]]:
    """The parameters that a schedule offers for evaluation, by the name of the row."""
    if schedule.startswith("schedule-free"):
        yield schedule, _schedule_free(optimizer, task, model)
    elif schedule.startswith("anytime"):
        yield schedule, _averaged(scheduler.averaged_parameters(), task, model)
        if schedule == "anytime":
            yield "anytime, last", contextlib.nullcontext()
    elif "+average" in schedule:
        yield schedule, _averaged(average.swapped(), task, model)
    else:
        yield schedule, contextlib.nullcontext()
        if average is not None:
            name = schedule.removesuffix(WARM_UP)
            row = schedule.replace(name, f"{name}+average")
            yield row, _averaged(average.swapped(), task, model)


@contextlib.contextmanager
def _averaged(swapped: Any, task: Any, model: nn.Module) -> Iterator[None]:
    with swapped, getattr(task, "statistics", contextlib.nullcontext)(model):
        yield


@contextlib.contextmanager
def _schedule_free(optimizer: Any, task: Any, model: nn.Module) -> Iterator[None]:
    optimizer.eval()
    with getattr(task, "statistics", contextlib.nullcontext)(model):
        yield
    optimizer.train()


# ---- all runs ----------------------------------------------------------------------------------


def runs(tasks: list[str]) -> list[tuple[int, Run]]:
    """All runs with their stage, the most important first."""
    chosen: list[tuple[tuple[int, int, int, int], int, Run]] = []
    for task in tasks:
        study = STUDIES[task]
        for (order, multiple), seed in itertools.product(
            enumerate(study.multiples), range(study.seeds)
        ):
            # Eight times the good rate is for the automatic warm-up alone.
            schedules = (*OPEN, *WARMED, *KNOWN, *OTHERS, *study.also) if multiple < 8 else (AUTO,)
            for schedule in schedules:
                lengths = study.lengths_at(multiple)
                open_end = schedule in (*OPEN, *WARMED, "autodrop")
                stage = 2 * schedule.endswith(WARM_UP) + (seed >= 3)
                if schedule not in (*OPEN, *WARMED, *KNOWN):
                    stage = len(STAGES) - 1
                key = (stage, order, seed, list(STUDIES).index(task))
                for of_run in [lengths] if open_end else [(n,) for n in lengths]:
                    run = Run(task, schedule, multiple * study.good, seed, of_run)
                    chosen.append((key, stage, run))
    return [(stage, run) for _, stage, run in sorted(chosen, key=lambda item: item[0])]


def missing(folder: pathlib.Path, tasks: list[str]) -> list[tuple[int, Run]]:
    """The runs of which a row is missing."""
    done = {(r["task"], r["schedule"], r["rate"], r["seed"], r["steps"]) for r in read(folder)}
    return [
        (stage, run)
        for stage, run in runs(tasks)
        if any((*run[:4], length) not in done for length in run.lengths)
    ]


def run_all(folder: pathlib.Path, tasks: list[str], workers: int, until: float) -> None:
    """Train what is missing; no run starts after ``until`` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
        (folder / "rows.jsonl").open("a") as file,
    ):
        waiting: set[concurrent.futures.Future[list[dict[str, Any]]]] = set()
        queue = iter(missing(folder, tasks))
        while True:
            while len(waiting) < workers and time.monotonic() - begin < until:
                _, run = next(queue, (0, None))
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


def plan(folder: pathlib.Path, tasks: list[str]) -> None:
    """Print how many runs and steps are missing, and how many minutes of one core they take."""
    of_step: dict[str, float] = {}
    of_read: dict[str, float] = {}
    for task in tasks:
        n = {"digits": 400, "quadratic": 1_000, "bytes": 30, "cifar": 30}[task]
        first, last = train(task, "constant+average", STUDIES[task].good, 0, (n, 3 * n))
        of_step[task] = (last["seconds"] - first["seconds"]) / (2 * n)
        begin = time.process_time()
        train(task, "constant+average", STUDIES[task].good, 0, (1, 2, 3))
        of_read[task] = (time.process_time() - begin) / 3
        print(f"{task}: {1e3 * of_step[task]:.3g} ms a step, {of_read[task]:.2g} s to read")
    total = 0.0
    left = missing(folder, tasks)
    for stage, name in enumerate(STAGES):
        for task in tasks:
            of_task = [run for at, run in left if at == stage and run.task == task]
            steps = sum(run.lengths[-1] for run in of_task)
            reads = sum(len(run.lengths) * (1 + _averages(run.schedule)) for run in of_task)
            minutes = (steps * of_step[task] + reads * of_read[task]) / 60
            total += minutes
            if of_task:
                print(
                    f"{name}: {task}: {len(of_task)} runs, {steps:,} steps, {minutes:.0f} minutes, "
                    f"{total:.0f} so far"
                )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("plan", "run", "report"))
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("build/lengths"))
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("build/lengths"))
    parser.add_argument("--task", nargs="+", choices=tuple(STUDIES), default=list(STUDIES))
    parser.add_argument("--cifar10", help="folder of CIFAR-10; without it, that task is left out")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after these")
    options = parser.parse_args()
    if options.cifar10 is not None:
        os.environ["CIFAR10"] = options.cifar10  # for the worker processes too
    elif options.what != "report" and "cifar" in options.task:
        print("cifar is left out: --cifar10 FOLDER names its data (see benchmarks/training.md)")
        options.task.remove("cifar")
    if options.what == "plan":
        plan(options.folder, options.task)
    elif options.what == "run":
        run_all(options.folder, options.task, options.workers, 60 * options.minutes)
    else:
        report(options.folder, options.to)


if __name__ == "__main__":
    main()
